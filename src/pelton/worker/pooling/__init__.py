"""Pooling methods: a file each, and its row here."""

from __future__ import annotations

from pelton.core.pooling import PoolingParams
from pelton.worker.pooling.cls import ClsPooler
from pelton.worker.pooling.labels import LabelsPooler
from pelton.worker.pooling.last import LastPooler
from pelton.worker.pooling.mean import MeanPooler
from pelton.worker.pooling.pooler import Pooler

POOLERS: dict[str, type[Pooler]] = {
    "last": LastPooler,
    "mean": MeanPooler,
    "cls": ClsPooler,
    "labels": LabelsPooler,
}


def make_pooler(params: PoolingParams) -> Pooler:
    return POOLERS[params.method](params)
