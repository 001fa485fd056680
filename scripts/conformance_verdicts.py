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
    """`passed`, a verdict of the table, or `defect`, and why. What fails on the server's side has no excuse."""
    if result["outcome"] == "passed":
        return "passed", ""
    if re.search(r"Error code: 5\d\d|ServerError: \(5\d\d", result["reason"]):
        return "defect", result["reason"]
    row = next((row for row in VERDICTS[suite] if row.explains(result)), None)
    return (row.verdict, row.why) if row else ("defect", result["reason"])


def refused(test: str, reason: str, why: str) -> Verdict:
    return Verdict(test, reason, REFUSED, why)


def not_applicable(test: str, reason: str, why: str) -> Verdict:
    return Verdict(test, reason, NOT_APPLICABLE, why)


OTHER_MODEL = "holds only of the text or the tokens of the model that the suite names"
TOOL_MODEL = "the small model writes no call, another one, or several"
REASONING_MODEL = "needs a model that reasons"
SEEING_MODEL = "needs a model that sees, or one from the network"
SAMPLED = "sampled words of the small model, which are right most of the time"
TOO_SLOW = "wants an answer within a second or so of a machine that had more to do"
OWN_CODE = "runs the engine's own code in the test's process, no server"
OWN_ENDPOINT = "an endpoint of that engine alone"
OWN_FIELD = "a field of that engine alone in the answer"
OWN_FLAG = "needs a server started with other flags, most of that engine alone"
WORDING = "the same refusal; asks for that engine's words, type or status of an error"
UNKNOWN = "a parameter or a form of one that Pelton does not have: a 400, never ignored"
ABSENT = "a field that was not asked for is absent, not null"
ROLE_DELTA = 'the first delta has the content "", not null, as OpenAI sends it'

VLLM = (
    not_applicable("", "^runs vLLM's own code|get_hidden_size|'Absent'", OWN_CODE),
    not_applicable("null_top_logprobs", "namespace", OWN_CODE),
    not_applicable("tool_use/", "^Skipping config", "another model, with a server of its own"),
    not_applicable("", "hf_model|test_bi_encoder", "compares with another model, run by another library"),
    not_applicable("test_metrics.*multimodal", "", SEEING_MODEL),
    not_applicable("test_metrics_exist", "waiting_by_reason", OWN_FIELD),
    refused("", "unknown parameter|is not supported; leave it out", UNKNOWN),
    refused("test_custom_role", "invalid enum value", "a role outside OpenAI's"),
    refused("kv_transfer", "KV is not transferred", "KV transfer by a parameter of a request"),
    refused("", "logprobs: expected int >= 0", "-1, the log probabilities of the whole vocabulary"),
    refused("test_batch_completions", "beam search", "beam search"),
    refused("", "no attribute 'prompt_logprobs'|'prompt_token_ids' in", ABSENT),
    refused("test_chat_streaming", "assert None", "finish_reason has a delta of its own, as OpenAI sends it"),
    refused("test_single_chat_session", "CompletionUsa", "usage has its details, as OpenAI sends it"),
    refused(
        "anthropic_streaming", "input_tokens|assert 1 > 5", "input_tokens leaves out cached ones, as Anthropic counts"
    ),
    refused("embed/.*chat_request|max_tokens_per_doc", "400", UNKNOWN),
    not_applicable("", "/invocations|/tokenizer_info|/llm/v1", OWN_ENDPOINT),
    not_applicable("test_server_load", "404", OWN_ENDPOINT),
    not_applicable(
        "pooling/.*(use_activation|test_pooling_)", "'(data|results|message)'|BadRequestError", OWN_ENDPOINT
    ),
    not_applicable("long_seed|test_stateful", "Regex pattern|greater_than", WORDING),
    not_applicable("max_model_len|pooling_not_supported|params_not_supported", "", WORDING),
    not_applicable("empty_prompt|token_ids", "Regex pattern did not match", WORDING),
    not_applicable("dynamic_lora_invalid_files|invalid_adapters", "not valid JSON", WORDING),
    not_applicable("dynamic_lora_badrequests", "Error code: 400", WORDING),
    not_applicable("serve/lora", "Meow", "asks what the adapters that the suite names were taught"),
    not_applicable("static_lora_lineage|test_check_models", "gguf", "the model's root is the file that was started"),
    not_applicable("test_show_version", "VLLM_VERSION", "asks for vLLM's own version"),
    not_applicable("test_truncate_prompt_tokens", "896 == 384", OTHER_MODEL),
    refused("test_no_request_id_header", "x-request-id", "X-Request-Id is in every answer"),
    not_applicable("v2_endpoint_accepts", "404", OWN_ENDPOINT),
    not_applicable("test_bigger_truncation_size", "BadRequestError", WORDING),
    not_applicable("test_background", "'in_progress' == 'completed'", TOO_SLOW),
    not_applicable("test_previous_response_id|test_structured_output$", "assert ('Mark'|1 == 2)", SAMPLED),
    not_applicable(r"return_tokens_as_token_ids_completion\[True\]", "", OWN_FLAG),
    not_applicable("request_cancellation", "max_tokens is 10000", "asks for a context longer than it was run with"),
    not_applicable(
        "thinking_token_budget|include_reasoning|reasoning_item|reasoning_tokens|test_simple_input", "", REASONING_MODEL
    ),
    refused("test_named_tool_use", "NoneType", "content is null beside a call, as OpenAI sends it"),
    not_applicable("function_call", "'reasoning'|took more", REASONING_MODEL),
    not_applicable("function_call", "len\\(\\[\\]\\)|is not None", TOOL_MODEL),
    not_applicable("function_call.*streaming", "assert 0 >= 2", TOOL_MODEL),
    not_applicable("parallel_tool|test_tool_call|anthropic_tool_call|with_tool_use", "", TOOL_MODEL),
    not_applicable(
        "test_(max_tokens|chat|instructions)$|test_max_tokens\\[", "completed|QED|took more|in '", OTHER_MODEL
    ),
    not_applicable("more_than_one_prompt_logprobs|response_format_json_schema|test_single_completion", "", OTHER_MODEL),
    not_applicable("comparison_with_prompt", r"endswith", OTHER_MODEL),
    not_applicable("test_basic\\[|encoder_online.py::test_basic|rerank_api", "At index 0|>= 0.9", OTHER_MODEL),
)
LLAMA = (
    not_applicable("", "runs vLLM's own code|huggingface.co|tinygemma3", "needs a model or a picture from the network"),
    not_applicable("", "skipping slow test|fails on linux", "skipped by the suite itself"),
    not_applicable("", "404 == |there is no /|== 404|404, ", OWN_ENDPOINT),
    not_applicable(
        "test_completion.py|test_metrics.py|test_slot|pooling_none", "KeyError: ('content'|'timings'|0)", OWN_ENDPOINT
    ),
    not_applicable("test_stream.py", "StopIteration", OWN_FLAG),
    not_applicable(
        "test_security.py::test_(incorrect|cors)|test_metrics_disabled|multiple_addresses|kv_keep", "", OWN_FLAG
    ),
    not_applicable("test_server_model", "", OWN_FLAG),
    not_applicable("", "__verbose|system_fingerprint|Process-Start-Time|None is not None", OWN_FIELD),
    not_applicable("correct_api_key", "'content' in", OWN_FIELD),
    not_applicable("test_context_size_exceeded", "", OWN_FLAG),
    not_applicable("", "= 'fp_", OWN_FIELD),
    refused("", "unknown parameter|unsupported_parameter", UNKNOWN),
    refused(
        "response_format|json_schema|multiple_choices|verbose_debug|logit_bias|tei_|mixed_input|text_same_as",
        "400",
        UNKNOWN,
    ),
    refused("test_tokenize|tokens_input", "assert 400 == 200", UNKNOWN),
    refused("anthropic_empty_messages", "400 == 200", "messages without one, as Anthropic's API"),
    refused("test_logprobs_stream", "assert '' is None", ROLE_DELTA),
    not_applicable(
        r"invalid_chat_completion_req\[messages7\]", "200", "two answers of the assistant in a row are allowed"
    ),
    not_applicable("image|vision|local_media", "400 == ", SEEING_MODEL),
    not_applicable("thinking", "", REASONING_MODEL),
    not_applicable("embedding_usage|rerank_usage|cached_tokens|openai_library", "assert|Assertion", OTHER_MODEL),
    not_applicable("pooling_none_oai", "200 == 400", OWN_FLAG),
    not_applicable("prompt_too_long", "too large", WORDING),
    not_applicable("test_tool_call.py::test_calc_result", "max_tokens is 8192|error: 400", OWN_FLAG),
    not_applicable("test_tokenize_with_bos", "== 1", OTHER_MODEL),
    not_applicable("test_tool_call.py", "Expected (1|no) tool call|for location|location (to|not)", TOOL_MODEL),
    not_applicable(
        "test_tool_call.py::test_hello_world",
        "JSONDecodeError|Expected hello world|code not found|string indices",
        SAMPLED,
    ),
    not_applicable("test_tool_call.py::test_thoughts", "Expected .*sum of", OTHER_MODEL),
)
VERDICTS = {"vllm": VLLM, "llama.cpp": LLAMA}
