"""Talk to a running ComfyUI: its HTTP API and the progress it sends over the websocket."""

import asyncio
import io
import json
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError

import aiohttp
from PIL import Image

Graph = dict[str, dict[str, Any]]
# Node class, steps done, steps in all.
OnProgress = Callable[[str, int, int], None]


class WorkflowError(RuntimeError):
    """A workflow that was refused, or a node that raised; `node` is its class, '' where it is the whole graph."""

    def __init__(self, node: str, message: str, traceback: str = "") -> None:
        super().__init__(f"{node or 'workflow'}: {message}")
        self.node = node
        self.message = message
        self.traceback = traceback


@dataclass(frozen=True)
class Result:
    """What a workflow left: `outputs` maps node id -> kind -> file entries, as /history gives them."""

    client: "Client"
    outputs: dict[str, dict[str, list]]

    def files(self) -> list[dict[str, str]]:
        """Entries of the pictures, in the order of their nodes: filename, subfolder, type."""
        return [entry for output in self.outputs.values() for entry in output.get("images", [])]

    def pictures(self) -> list[Image.Image]:
        return [self.client.picture(entry) for entry in self.files()]


@dataclass(frozen=True)
class Client:
    url: str

    def request(self, path: str, data: object = None) -> Any:
        """GET, or POST of `data` as JSON; returns the decoded answer, None where there is none."""
        body = None if data is None else json.dumps(data).encode()
        question = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(question, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def object_info(self) -> dict[str, dict]:
        return self.request("/object_info")

    def picture(self, entry: dict[str, str]) -> Image.Image:
        with urllib.request.urlopen(f"{self.url}/view?{urllib.parse.urlencode(entry)}", timeout=60) as answer:
            return Image.open(io.BytesIO(answer.read())).convert("RGB")

    def free(self) -> None:
        """Ask the server to unload all models and forget all results; it does so as soon as it is idle."""
        self.request("/free", {"unload_models": True, "free_memory": True})

    def run(self, graph: Graph, on_progress: OnProgress | None = None, timeout: float = 600) -> Result:
        """Run a workflow in API form; WorkflowError if it is refused or fails, TimeoutError if it takes longer."""
        prompt_id = asyncio.run(asyncio.wait_for(self._run(graph, on_progress), timeout))
        return Result(self, self.request(f"/history/{prompt_id}")[prompt_id]["outputs"])

    async def _run(self, graph: Graph, on_progress: OnProgress | None) -> str:
        name = uuid.uuid4().hex
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{self.url}/ws?clientId={name}") as socket:
            prompt_id = await asyncio.to_thread(self._post, graph, name)
            async for message in socket:
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                if event["data"].get("prompt_id") != prompt_id:
                    continue
                # Sent last, when /history has the result.
                if event["type"] == "executing" and event["data"]["node"] is None:
                    return prompt_id
                handle(event["type"], event["data"], graph, on_progress)
        raise WorkflowError("", "the server closed the connection; see its log")

    def _post(self, graph: Graph, name: str) -> str:
        try:
            return self.request("/prompt", {"prompt": graph, "client_id": name})["prompt_id"]
        except HTTPError as error:
            raise refusal(json.loads(error.read())) from None


def handle(kind: str, data: dict[str, Any], graph: Graph, on_progress: OnProgress | None) -> None:
    if kind == "execution_error":
        raise WorkflowError(data["node_type"], data["exception_message"].strip(), "".join(data["traceback"]))
    if kind == "execution_interrupted":
        raise WorkflowError(data["node_type"], "interrupted")
    if kind == "progress" and on_progress:
        on_progress(graph[data["node"]]["class_type"], data["value"], data["max"])


def refusal(answer: dict[str, Any]) -> WorkflowError:
    """The server's reasons for not running a workflow: the first node it names, and all that is wrong with it."""
    for node in answer.get("node_errors", {}).values():
        reasons = [f"{error['message']}: {error['details']}" for error in node["errors"]]
        return WorkflowError(node["class_type"], "; ".join(reasons))
    return WorkflowError("", f"{answer['error']['message']}: {answer['error']['details']}")
