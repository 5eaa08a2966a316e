"""One picture from GGUF files in the real ComfyUI:  make demo

The example workflow, posted to the server as the page would post it. Its model files are the small samples under the
names that the workflow asks for, so the picture shows colours and no lighthouse.
"""

import json
import signal
import sys
import time
from types import FrameType

import torch
from host import in_process, samples, workflows
from host.client import Graph, WorkflowError
from host.environment import HOST, ROOT, find_comfyui
from host.server import running_server

BASE = HOST / "demo"
EXAMPLE = ROOT / "example_workflows" / "flux_gguf.json"
SIZE = 256
STEPS = 4


def print_costs() -> None:
    print(f"{'model':46} {'safetensors':>14} {'GGUF':>14}")
    for file, (name, type_name, naming) in samples.EXAMPLE_FILES.items():
        before = samples.sample(name).stat().st_size
        after = samples.gguf(name, type_name, naming).stat().st_size
        print(f"{file:46} {before:12,} B {after:12,} B  {after / before:4.0%}")


def example(object_info: dict[str, dict]) -> Graph:
    """The example workflow with a LoRA, at a size and a number of steps that a CPU takes a second for."""
    graph = workflows.from_page(json.loads(EXAMPLE.read_text(encoding="utf-8")), object_info)
    changes = {
        "LoraLoaderGGUF": {"lora_1": samples.sample("tiny_flux_256_lora").name},
        "EmptySD3LatentImage": {"width": SIZE, "height": SIZE},
        "KSampler": {"steps": STEPS},
    }
    for node in graph.values():
        node["inputs"] |= changes.get(node["class_type"], {})
    return graph


def print_step(node: str, step: int, steps: int) -> None:
    print(f"{node} {step}/{steps}", flush=True)


def interrupt(number: int, frame: FrameType | None) -> None:
    """On SIGTERM leave through the with block, which stops the server."""
    raise SystemExit(128 + number)


def main() -> int:
    signal.signal(signal.SIGTERM, interrupt)
    comfyui = find_comfyui()
    in_process.bind(comfyui)
    samples.discard_outdated()
    samples.make_example_files()
    print_costs()
    started = time.monotonic()
    # ComfyUI does not take both.
    device = "--lowvram" if torch.cuda.is_available() else "--cpu"
    with running_server(comfyui, BASE, samples.MODELS, device=device) as client:
        print(f"The server is ready after {time.monotonic() - started:.1f} s: {client.url}", flush=True)
        try:
            result = client.run(example(client.object_info()), print_step)
        except WorkflowError as error:
            print(f"{error}\n{error.traceback}The server's log: {BASE / 'server.log'}", file=sys.stderr)
            return 1
    for entry in result.files():
        print(f"The picture: {BASE / 'output' / entry['subfolder'] / entry['filename']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
