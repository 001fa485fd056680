"""An engine that has computed prompts.   usage: python -m tests.cluster.llm_process

Reads one line of JSON: `settings` of the engine, `prompts` of token ids, and `lora`, their adapter; says "ready" once
their KV is there.
"""

from __future__ import annotations

import json
import sys

from pelton import LLM, SamplingParams

if __name__ == "__main__":
    options = json.loads(sys.stdin.readline())
    with LLM(**options["settings"]) as llm:
        llm.generate(options["prompts"], SamplingParams(temperature=0, max_tokens=1), lora=options["lora"])
        print("ready", flush=True)
        sys.stdin.read()
