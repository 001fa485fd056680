"""The rows of stored chat completions in the table of routes (`serving/routes.py`)."""

from __future__ import annotations

from pelton.serving.openai.responses import StoredChatCompletion
from pelton.serving.openai.stored_chat import handlers, objects
from pelton.serving.route import BODY_ERRORS, Route

PATH = "/v1/chat/completions"
_ERRORS = (400, 401, 403, 404, 503)

STORED_CHAT_ROUTES: tuple[Route, ...] = (
    Route(
        method="GET",
        path=PATH,
        handler=handlers.list_chat_completions,
        summary="The tenant's stored chat completions, the oldest first",
        query=objects.CompletionsQuery,
        answer=objects.CompletionList,
        errors=(400, 401, 403, 503),
        has_tenant=True,
    ),
    Route(
        method="GET",
        path=f"{PATH}/{{completion_id}}",
        handler=handlers.show_chat_completion,
        summary="A stored chat completion",
        answer=StoredChatCompletion,
        errors=_ERRORS,
        has_tenant=True,
    ),
    Route(
        method="POST",
        path=f"{PATH}/{{completion_id}}",
        handler=handlers.update_chat_completion,
        summary="Change the metadata of a stored chat completion",
        body=objects.CompletionChanges,
        answer=StoredChatCompletion,
        errors=(*BODY_ERRORS, 503),
        has_tenant=True,
    ),
    Route(
        method="DELETE",
        path=f"{PATH}/{{completion_id}}",
        handler=handlers.delete_chat_completion,
        summary="Forget a stored chat completion",
        answer=objects.DeletedCompletion,
        errors=_ERRORS,
        has_tenant=True,
    ),
    Route(
        method="GET",
        path=f"{PATH}/{{completion_id}}/messages",
        handler=handlers.list_stored_messages,
        summary="The messages that a stored chat completion answers",
        query=objects.StoredMessagesQuery,
        answer=objects.StoredMessageList,
        errors=_ERRORS,
        has_tenant=True,
    ),
)
