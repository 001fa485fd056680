"""LoRA adapters made by `peft` on the real model: in one batch as alone, against peft itself, and over HTTP."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import peft
import pytest
import torch

from pelton import LLM, SamplingParams
from pelton.core.errors import InvalidRequestError, ModelNotFoundError, PeltonError
from pelton.weights.model_files import open_model
from pelton.weights.tokenizer import load_tokenizer
from tests.make_lora import ATTENTION, EVERYTHING, save_adapter_for
from tests.system.server import Server, run_server
from tests.worker.test_models_real import reference_config, reference_model

pytestmark = pytest.mark.model

NAMES = ("first", "second", "third")
OPTIONS: dict[str, dict[str, Any]] = {
    "first": {"seed": 1, "r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
    "second": {"seed": 2, "r": 16, "lora_alpha": 16, "target_modules": EVERYTHING, "dtype": torch.bfloat16},
    "third": {"seed": 3, "r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
}
STARTS = ("The capital of France is", "def add(a, b):\n", "Once upon a time, in a small", "1, 2, 3, 5, 8,")
CONTEXT = "A scheduler decides which tokens are computed next, and a cache keeps what was computed before. "


@pytest.fixture(scope="module")
def folders(default_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    config = reference_config(open_model(default_model_path).spec)
    for name, options in OPTIONS.items():
        save_adapter_for(config, root / name, **options)
    return {name: root / name for name in NAMES}


def modules(folders: dict[str, Path], *names: str) -> tuple[str, ...]:
    return tuple(f"{name}={folders[name]}" for name in names)


@pytest.fixture(scope="module")
def work() -> list[tuple[str, SamplingParams, str | None]]:
    """Prompts of 5 to 90 tokens, greedy and not, one or three answers, with two adapters and without."""
    chooser, found = random.Random(3), []
    for index in range(12):
        text = CONTEXT * chooser.choice([0, 0, 1, 2]) + STARTS[index % len(STARTS)]
        sampling = SamplingParams(
            temperature=0 if index % 3 else 0.8,
            seed=index,
            n=2 if index % 6 == 5 else 1,
            max_tokens=chooser.choice([3, 8, 24]),
            logprobs=1,
            ignore_eos=True,
        )
        found.append((text, sampling, (None, "first", "second")[index % 3]))
    return found


def answers(generations: Sequence[Any]) -> list[list[Any]]:
    return [[(s.token_ids, s.logprobs) for s in generation.sequences] for generation in generations]


@pytest.fixture(scope="module")
def alone(default_model_path: Path, folders: dict[str, Path], work: list[Any]) -> list[list[Any]]:
    settings = {"max_model_len": 512, "max_num_batched_tokens": 512, "enable_prefix_caching": False}
    with LLM(str(default_model_path), lora_modules=modules(folders, *NAMES), **settings) as llm:
        return [answers(llm.generate(text, sampling, lora=lora))[0] for text, sampling, lora in work]


SETTINGS: dict[str, dict[str, Any]] = {
    "chunks of 16": {"long_prefill_chunk": 16},
    "one thread, no overlap": {"threads": 1, "enable_overlap": False, "max_num_batched_tokens": 512},
    "preempted": {"num_kv_blocks": 7, "enable_prefix_caching": False, "max_model_len": 96},
}


@pytest.mark.parametrize("name", list(SETTINGS))
def test_together_as_alone(
    default_model_path: Path, folders: dict[str, Path], work: list[Any], alone: list[list[Any]], name: str
) -> None:
    """Tokens and logprobs, bit for bit: law 3 for the base and two adapters in one batch."""
    settings = {"max_model_len": 512, "lora_modules": modules(folders, *NAMES)} | SETTINGS[name]
    texts, samplings, loras = map(list, zip(*work, strict=True))
    with LLM(str(default_model_path), **settings) as llm:
        together = llm.generate(texts, samplings, lora=loras)
        assert answers(together) == alone
        if name == "preempted":
            assert llm.stats.num_preemptions_total > 0
        if settings.get("enable_prefix_caching", True):
            again = llm.generate(texts, samplings, lora=loras)
            assert answers(again) == alone
            assert sum(answer.num_cached_tokens for answer in again) > 0
        assert llm.stats.num_blocks_used == 0
    by_adapter = {lora: alone[index] for index, lora in enumerate(loras[:3])}
    assert len({str(answer) for answer in by_adapter.values()}) == 3


def test_a_name_with_other_weights_finds_nothing_of_the_old_ones(
    default_model_path: Path, folders: dict[str, Path]
) -> None:
    text, sampling = CONTEXT * 4, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with LLM(str(default_model_path), max_model_len=512, lora_modules=modules(folders, "third")) as llm:
        expected = llm.generate(text, sampling, lora="third")[0]
        base = llm.generate(text, sampling)[0]
        assert base.num_cached_tokens == 0
        llm.load_adapter("name", str(folders["first"]))
        old = llm.generate(text, sampling, lora="name")[0]
        assert llm.generate(text, sampling, lora="name")[0].num_cached_tokens > 0
        with pytest.raises(InvalidRequestError, match="already been loaded"):
            llm.load_adapter("name", str(folders["second"]))
        llm.load_adapter("name", str(folders["second"]), replace=True)
        new = llm.generate(text, sampling, lora="name")[0]
        assert new.num_cached_tokens == 0
        # The same content under another name shares what was computed.
        llm.load_adapter("name", str(folders["third"]), replace=True)
        same = llm.generate(text, sampling, lora="name")[0]
        assert same.num_cached_tokens > 0
        assert same.text == expected.text
        assert len({each.text for each in (expected, base, old, new)}) == 4
        with pytest.raises(ModelNotFoundError, match="no adapter"):
            llm.generate(text, sampling, lora="nobody")


def loaded(llm: LLM) -> Any:
    return llm._client._transport._loop.engine.adapters._store  # type: ignore[union-attr]


def test_an_unloaded_adapter_serves_what_runs_and_is_then_freed(
    default_model_path: Path, folders: dict[str, Path]
) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with LLM(str(default_model_path), max_model_len=512, lora_modules=modules(folders, "first", "second")) as llm:
        expected = llm.generate(STARTS[0], sampling, lora="second")[0].text
        stream = llm.stream(STARTS[0], sampling, lora="second")
        parts = [next(stream).text]
        llm.unload_adapter("second")
        assert len(loaded(llm)) == 2
        with pytest.raises(ModelNotFoundError):
            llm.generate("a", sampling, lora="second")
        parts += [output.text for output in stream]
        assert "".join(parts) == expected
        deadline_s = time.monotonic() + 20
        while len(loaded(llm)) > 1:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        llm.load_adapter("second", str(folders["second"]))
        assert llm.generate(STARTS[0], sampling, lora="second")[0].text == expected
        llm.unload_adapter("first")
        while len(loaded(llm)) > 1:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def test_loads_and_unloads_under_fire_lose_no_request(default_model_path: Path, folders: dict[str, Path]) -> None:
    """One thread swaps what a name stands for, others generate with it: each answer is that of one of the two."""
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with LLM(str(default_model_path), max_model_len=512, lora_modules=modules(folders, "first", "third")) as llm:
        allowed = {llm.generate(STARTS[1], sampling, lora=name)[0].text for name in ("first", "third")}
        llm.load_adapter("name", str(folders["first"]))
        found: set[str] = set()

        def generate() -> None:
            for _ in range(4):
                found.update(each.text for each in llm.generate([STARTS[1]] * 3, sampling, lora="name"))

        threads = [threading.Thread(target=generate) for _ in range(2)]
        for thread in threads:
            thread.start()
        for index in range(6):
            llm.load_adapter("name", str(folders[("third", "first")[index % 2]]), replace=True)
            llm.load_adapter("passing", str(folders["second"]))
            llm.unload_adapter("passing")
        for thread in threads:
            thread.join()
        assert found
        assert found <= allowed


def test_settings_that_cannot_be_met_end_the_start(default_model_path: Path, folders: dict[str, Path]) -> None:
    for settings, words in [
        ({"lora_modules": modules(folders, "first", "second"), "max_loras": 1}, "max_loras"),
        ({"lora_modules": modules(folders, "second"), "max_lora_rank": 8}, "rank 16, more than max_lora_rank"),
        ({"lora_modules": ("a=/nowhere",)}, "/nowhere"),
        ({"lora_modules": ("a",)}, "NAME=PATH"),
        ({"lora_modules": ("a=b", '{"name": "a", "path": "c"}')}, "twice"),
    ]:
        with pytest.raises(PeltonError, match=words):
            LLM(str(default_model_path), max_model_len=64, **settings)


async def test_over_http(default_model_path: Path, folders: dict[str, Path]) -> None:
    flags = (
        "--lora-modules",
        *modules(folders, "first"),
        json.dumps({"name": "second", "path": str(folders["second"])}),
    )
    options = (
        "--max-model-len",
        "512",
        "--served-model-name",
        "base",
        "--max-loras",
        "3",
        "--allow-runtime-lora-updating",
    )
    async with run_server(default_model_path, *flags, *options) as server:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        await check_listing(client, server)
        await check_answers(client, ("base", "first", "second"))
        await check_changes(client, server, folders)
        (engine,) = server.engine_processes()
        engine.kill()
        await asyncio.sleep(0.2)
        await server.wait_ready()
        assert [model.id async for model in client.models.list()] == ["base", "first", "second", "copy", "third"]
        await check_answers(client, ("third", "copy", "base"))


async def check_listing(client: openai.AsyncOpenAI, server: Server) -> None:
    models = {model.id: model for model in (await client.models.list()).data}
    assert list(models) == ["base", "first", "second"]
    assert models["base"].parent is None  # type: ignore[attr-defined]
    assert models["second"].parent == "base"  # type: ignore[attr-defined]
    assert (await client.models.retrieve("first")).root.endswith("first")  # type: ignore[attr-defined]
    async with server.http.post(f"{server.url}/tokenize", json={"model": "first", "prompt": "a b"}) as response:
        assert response.status == 200


async def check_answers(client: openai.AsyncOpenAI, names: Sequence[str]) -> None:
    """Alone, all at once, streamed, of two answers, and of a conversation."""

    async def complete(name: str, **more: Any) -> list[str]:
        answer = await client.completions.create(
            model=name, prompt=STARTS[0], temperature=0, max_tokens=12, extra_body={"ignore_eos": True}, **more
        )
        assert answer.model == name
        return [choice.text for choice in answer.choices]

    async def stream(name: str) -> str:
        deltas = await client.completions.create(
            model=name, prompt=STARTS[0], temperature=0, max_tokens=12, stream=True, extra_body={"ignore_eos": True}
        )
        return "".join([chunk.choices[0].text async for chunk in deltas])

    async def chat(name: str) -> str | None:
        answer = await client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "Say hello."}], temperature=0, max_tokens=8
        )
        return answer.choices[0].message.content

    alone = {name: (await complete(name))[0] for name in names}
    chats = {name: await chat(name) for name in names}
    assert len(set(alone.values())) == len(names)
    twos = [complete(name, n=2) for name in names]
    together = await asyncio.gather(*map(stream, names), *twos, *map(chat, names))
    assert together == [*alone.values(), *([text, text] for text in alone.values()), *chats.values()]


async def check_changes(client: openai.AsyncOpenAI, server: Server, folders: dict[str, Path]) -> None:
    async def post(path: str, **body: Any) -> tuple[int, str]:
        async with server.http.post(server.url + path, json=body) as response:
            return response.status, await response.text()

    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    third = str(folders["third"])
    with pytest.raises(openai.NotFoundError, match="served: base, first, second"):
        await client.completions.create(model="third", prompt="a", max_tokens=1)
    assert await post(load, lora_name="third", lora_path=third) == (
        200,
        "Success: LoRA adapter 'third' added successfully.",
    )
    for body, status, words in [
        ({"lora_name": "third", "lora_path": third}, 400, "already been loaded"),
        ({"lora_name": "base", "lora_path": third}, 400, "the model itself"),
        ({"lora_name": "new", "lora_path": "/nowhere"}, 404, "/nowhere"),
        ({"lora_name": "new", "lora_path": str(folders["third"].parent)}, 404, "adapter_config.json"),
        ({"lora_name": "a b", "lora_path": third}, 400, "lora_name"),
        ({"lora_name": "new"}, 400, "lora_path"),
    ]:
        got, text = await post(load, **body)
        assert (got, words in text) == (status, True), text
    assert (await post(load, lora_name="copy", lora_path=str(folders["first"])))[0] == 200  # of one that is there
    async with server.http.get(f"{server.url}/metrics") as response:
        (line,) = [line for line in (await response.text()).splitlines() if line.startswith("vllm:lora_requests_info{")]
    assert 'max_lora="3"' in line
    assert 'running_lora_adapters=""' in line
    assert (await post(unload, lora_name="third"))[0] == 200
    assert (await post(unload, lora_name="third"))[0] == 404
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="third", prompt="a", max_tokens=1)
    assert (await post(load, lora_name="third", lora_path=third))[0] == 200


def test_logprobs_equal_those_of_peft(default_model_path: Path, folders: dict[str, Path]) -> None:
    """The file's weights decoded to float32, under `transformers` and peft."""
    files = open_model(default_model_path)
    tokens = load_tokenizer(default_model_path).encode(CONTEXT + STARTS[1])
    adapted = peft.PeftModel.from_pretrained(reference_model(files), folders["first"], adapter_name="first")
    adapted.load_adapter(folders["second"], adapter_name="second")
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    settings = {"activation_dtype": "float32", "kv_cache_dtype": "float32", "max_model_len": 256}
    with LLM(str(default_model_path), lora_modules=modules(folders, "first", "second"), **settings) as llm:
        results = llm.generate([tokens] * 3, sampling, lora=["first", None, "second"])
    found = dict(zip(("first", None, "second"), results, strict=True))
    for name in ("first", "second"):
        adapted.set_adapter(name)
        with torch.inference_mode():
            expected = adapted(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        expected = expected[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        logprobs = torch.tensor([each.logprob for each in found[name].prompt_logprobs])
        base = torch.tensor([each.logprob for each in found[None].prompt_logprobs])
        torch.testing.assert_close(logprobs, expected, rtol=1e-3, atol=1e-3)  # off by 3e-4 at most when written
        assert (base - expected).abs().max() > 0.1
