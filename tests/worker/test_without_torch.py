"""Native kernels need no torch: it is neither imported nor asked for. A process of its own has none yet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from tests.weights.make_models import TINY_CONFIGS, random_tensors, write_gguf

RUN_AND_LOOK = """
import sys
from pathlib import Path
from pelton.core.batch import RequestContext, ScheduledBatch, ScheduledRequest
from pelton.core.errors import ConfigError
from pelton.core.sampling_params import SamplingParams
from pelton.engine.config import EngineConfig
from pelton.weights.config import ModelConfig
from pelton.weights.model_files import open_model
from pelton.worker.config import WorkerConfig
from pelton.worker.executors.build_worker import build_executor

files = open_model(Path(sys.argv[1]))
engine_config = EngineConfig(num_kv_blocks=20)

def build(**settings):
    return build_executor(files, ModelConfig(), WorkerConfig(threads=2, **settings), engine_config, eos_token_ids=())

executor, info = build()
request = ScheduledRequest(
    "a", (5, 6, 7), 0, tuple((1 + i,) for i in range(len(files.spec.kv_groups))),
    SamplingParams(temperature=0.7, top_p=0.9, logprobs=2, prompt_logprobs=1, presence_penalty=0.5), samples=True,
    context=RequestContext((5, 6, 7), (), 0),
)
result = executor.submit(ScheduledBatch(1, (request,))).result(timeout=30)
executor.close()
assert info.kernels.startswith("native"), info
assert len(result.sampled_token_ids[0]) == 1, result
assert "torch" not in sys.modules

sys.modules["torch"] = None  # as where it is not installed
for settings in ({"kernel_backend": "reference"}, {"dtype": "bfloat16"}):
    try:
        build(**settings)
    except ConfigError as error:
        assert "pip install 'pelton[reference]'" in str(error), error
    else:
        raise AssertionError(settings)
"""


@pytest.mark.parametrize("quantized", ["Q8_0", "F16"])  # packed matrices, and decoded ones
@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_an_engine_runs_without_torch(architecture: str, quantized: str, tmp_path: Path) -> None:
    config = TINY_CONFIGS[architecture]
    path = tmp_path / "model.gguf"
    write_gguf(path, config, random_tensors(config), quantized=gguf.GGMLQuantizationType[quantized])
    done = subprocess.run([sys.executable, "-c", RUN_AND_LOOK, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
