"""Talks to the runtime with OpenAI's SDK, and prints what came of it as JSON.

Arguments: the runtime's base URL, and one where each piece of a stream is acknowledged: the mock model sends no piece
before the one before it was, so that a runtime that holds pieces back gets none.
"""

import json
import sys
import urllib.request

import openai

base, acknowledge = sys.argv[1:]


def client(key="good key", **options):
    return openai.OpenAI(base_url=base, api_key=key, max_retries=0, timeout=10, **options)


def error(call):
    try:
        call()
    except openai.APIStatusError as error:
        return {"kind": type(error).__name__, "status": error.status_code, "code": error.code, "message": str(error)}
    except openai.APIError as error:
        return {"kind": type(error).__name__, "message": str(error)}


def ask(model, **options):
    messages = [{"role": "user", "content": "Hi"}]
    return client(**options.pop("client", {})).chat.completions.create(model=model, messages=messages, **options)


def stream(model):
    pieces = []
    for piece in ask(model, stream=True):
        pieces.append(piece.choices[0].delta.content)
        urllib.request.urlopen(acknowledge, timeout=5).close()
    return pieces


whole = ask("echo")
print(json.dumps({
    "whole": whole.choices[0].message.content,
    "request_id": bool(whole._request_id),
    "pieces": stream("echo"),
    "unknown_model": error(lambda: ask("none")),
    "wrong_key": error(lambda: ask("echo", client={"key": "bad key"})),
    "refused_by_model": error(lambda: ask("echo", temperature=9)),
    "broken": error(lambda: stream("broken")),
    "limited": error(lambda: ask("limited")),
    "retried": ask("limited-once").choices[0].message.content,
}))
