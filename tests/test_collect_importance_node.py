"""The node GGUFCollectImportance in the real server: it watches a model that samples, and changes no picture."""

import pytest
import torch
from gguf_native.loader import open_gguf
from gguf_native.quantizer import convert
from gguf_native.quantizer.importance import read_importance
from host.client import WorkflowError
from host.workflows import node, text_to_image

NAME = "seen"


def graph(samples, watched: bool, seed: int):
    nodes = text_to_image(
        node("UnetLoaderGGUF", unet_name=samples.gguf("tiny_flux", "Q4_K").name),
        node("CLIPLoaderGGUF", clip_name=samples.gguf("clip_l", "Q5_K").name, type="stable_diffusion"),
        node("VAELoaderGGUF", vae_name=samples.gguf("tiny_flux_vae", "Q8_0").name),
        seed=seed,
    )
    if watched:
        nodes["watch"] = node("GGUFCollectImportance", model=["model", 0], name=NAME)
        nodes["sampler"]["inputs"]["model"] = ["watch", 0]
    return nodes


def test_what_it_collects_serves_the_quantiser(server, samples, tmp_path):
    (plain,) = server.run(graph(samples, False, seed=41)).pictures()
    (watched,) = server.run(graph(samples, True, seed=41)).pictures()
    assert watched.tobytes() == plain.tobytes()
    path = server.base / "output" / "importance" / f"{NAME}.gguf"
    first = read_importance(path)
    with open_gguf(samples.gguf("tiny_flux", "Q4_K")) as file:
        matrices = {name: info.shape[1] for name, info in file.tensors.items() if len(info.shape) == 2}
    assert {name: len(values) for name, values in first.items()} == matrices
    assert all(float(values.max()) > 0 for values in first.values())

    server.run(graph(samples, True, seed=42))
    second = read_importance(path)
    assert any(not torch.equal(second[name], first[name]) for name in first)
    (target,) = convert(samples.sample("tiny_flux"), tmp_path / "out.gguf", "Q3_K_M", importance=path)
    (blind,) = convert(samples.sample("tiny_flux"), tmp_path / "blind.gguf", "Q3_K_M")
    assert target.stat().st_size - blind.stat().st_size < 200
    assert target.read_bytes() != blind.read_bytes()


def test_a_cancelled_run_does_not_count(host, samples, tmp_path, monkeypatch):
    import comfy.model_management as mm
    import folder_paths
    from gguf_native.loader.diffusion_model import load_diffusion_model
    from gguf_native.nodes.collect_importance import GGUFCollectImportance
    from sampling import sample

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    with torch.inference_mode():
        model = load_diffusion_model(str(samples.gguf("tiny_flux_256", "Q4_K")))
        (watched,) = GGUFCollectImportance.execute(model, NAME).args
        # Cancel is pressed when the first of two steps is nearly done.
        last_layer = model.model.diffusion_model.final_layer
        pressed = last_layer.register_forward_hook(lambda *_: mm.interrupt_current_processing(True))
        with pytest.raises(mm.InterruptProcessingException):
            sample(watched, "tiny_flux_256", 2)
        pressed.remove()
        assert list(tmp_path.rglob("*.*")) == []
        sample(watched, "tiny_flux_256", 2)
    assert [path.name for path in tmp_path.rglob("*.*")] == [f"{NAME}.gguf"]


def test_a_name_of_another_folder_is_refused(server, samples):
    nodes = graph(samples, True, seed=43)
    nodes["watch"]["inputs"]["name"] = "../seen"
    with pytest.raises(WorkflowError, match="is no name of a file"):
        server.run(nodes)
    assert not (server.base / "output" / "seen.gguf").exists()
