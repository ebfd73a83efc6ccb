"""An MCP server of the public SDK, for both revisions of the protocol. Prints its port, and serves until its input ends."""

import json
import os
import socket
import sys
import threading

import uvicorn
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("peer", log_level="CRITICAL")


@server.tool()
def add(a: int, b: int) -> int:
    return a + b


@server.tool()
def shout(question: str) -> str:
    return question.upper()


@server.tool()
def facts(title: str, content: str, requester: str) -> dict[str, str]:
    return {"title": title, "content": content, "requester": requester}


@server.tool()
def fail(question: str) -> str:
    raise ToolError("out of paper")


def end_with_input():
    sys.stdin.read()
    os._exit(0)


listener = socket.create_server(("127.0.0.1", 0))
print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
threading.Thread(target=end_with_input, daemon=True).start()
app = server.streamable_http_app(json_response=sys.argv[1] == "json")
uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
