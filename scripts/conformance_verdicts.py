"""Why a test of another project does not pass here: rows of (test, reason, verdict, why), the first that matches.

`test` and `reason` are regular expressions over what conformance_vllm.py writes. A failure that no row explains is a
defect until somebody has looked at it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

REFUSED = "refused on purpose"
NOT_APPLICABLE = "does not apply"


@dataclass(frozen=True)
class Verdict:
    test: str
    reason: str
    verdict: str
    why: str

    def explains(self, result: dict[str, str]) -> bool:
        return bool(re.search(self.test, result["test"]) and re.search(self.reason, result["reason"]))


def verdict_of(suite: str, result: dict[str, str]) -> tuple[str, str]:
    """`passed`, a verdict of the table, or `defect`, and why."""
    if result["outcome"] == "passed":
        return "passed", ""
    row = next((row for row in VERDICTS[suite] if row.explains(result)), None)
    return (row.verdict, row.why) if row else ("defect", result["reason"])


OTHER_MODEL = "holds only of the text of the model that the suite names"
TOOL_MODEL = "the small model does not choose to call the tool, or calls one only"
REASONING_MODEL = "needs a model that reasons"
OWN_CODE = "runs that project's own code in the test's process, no server"
OWN_ENDPOINT = "an endpoint of that engine alone"
OWN_FLAG = "a server flag of that engine alone"
WORDING = "the same status; asks for that engine's wording or type of error"
UNKNOWN = "a parameter that Pelton does not have is a 400, never ignored"
ABSENT = "a field that was not asked for is absent, not null"

VLLM = (
    Verdict("", "^runs vLLM's own code|^Skipping config", NOT_APPLICABLE, OWN_CODE),
    Verdict("n_parameter|null_top_logprobs", "Absent|namespace", NOT_APPLICABLE, OWN_CODE),
    Verdict("", "hf_model|fixture '", NOT_APPLICABLE, "compares with another model, run by another library"),
    Verdict("", "unknown parameter", REFUSED, UNKNOWN),
    Verdict("test_custom_role", "", REFUSED, "a role outside OpenAI's"),
    Verdict("kv_transfer", "KV is not transferred", REFUSED, "KV transfer by a parameter of a request"),
    Verdict("", "logprobs: expected int >= 0", REFUSED, "-1, the log probabilities of the whole vocabulary"),
    Verdict("test_batch_completions", "beam search", REFUSED, "beam search"),
    Verdict("", "no attribute 'prompt_logprobs'|'prompt_token_ids' in", REFUSED, ABSENT),
    Verdict("test_chat_streaming", "assert None", REFUSED, "finish_reason has a delta of its own, as OpenAI sends it"),
    Verdict("test_single_chat_session", "CompletionUsa", REFUSED, "usage has its details, as OpenAI sends it"),
    Verdict("anthropic_streaming", "input_tokens", REFUSED, "input_tokens leaves out cached ones, as Anthropic counts"),
    Verdict("long_seed|test_stateful|max_model_len|pooling_not_supported", "", NOT_APPLICABLE, WORDING),
)
LLAMA = (
    Verdict("", "runs vLLM's own code|huggingface.co", NOT_APPLICABLE, "needs a model or a picture from the network"),
)
VERDICTS = {"vllm": VLLM, "llama.cpp": LLAMA}
