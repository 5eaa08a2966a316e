"""What is trained is what the host runs: its text, its model, its file formats."""

import pytest
import torch
from gguf_native.training import scenes
from safetensors.torch import load_file

CAPTIONS = scenes.random_captions(3, seed=1)


@pytest.fixture(scope="module")
def training(host):
    """The modules that import comfy, in its training mode."""
    from gguf_native.training import autoencoder, engine, flow, lora, train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.model_management, "in_training", True)
        yield {"autoencoder": autoencoder, "engine": engine, "flow": flow, "lora": lora, "train": train}


@pytest.fixture
def model(training):
    torch.manual_seed(0)
    model = training["flow"].build(torch.device("cpu"))
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter.data, std=0.02)
    return model


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 77, 768, generator=generator), torch.randn(2, 768, generator=generator)


def test_text_is_that_of_the_hosts_node(training):
    clip = training["engine"].load_clip()
    sentences = [*map(str, CAPTIONS), ""]
    context, pooled = training["engine"].encode(clip, sentences, torch.device("cpu"))
    for number, sentence in enumerate(sentences):
        ((expected, extra),) = clip.encode_from_tokens_scheduled(clip.tokenize(sentence))
        assert torch.allclose(context[number].float(), expected[0], atol=0.02)
        assert torch.allclose(pooled[number].float(), extra["pooled_output"][0], atol=0.02)


def test_velocity_is_that_of_the_hosts_forward(training, model, prompts):
    flow, latents, time = training["flow"], torch.randn(2, 16, 16, 16), torch.tensor([0.2, 1.0])
    with torch.no_grad():
        own = flow.to_latents(flow.velocity(model, flow.to_tokens(latents), time, *prompts))
        assert own.abs().max() > 0.01
        assert torch.equal(own, model(latents, time, *prompts))


def test_rows_fit_every_type_and_files_the_limit(training, model):
    rows = {tuple(weight.shape): name for name, weight in model.named_parameters() if weight.dim() == 2}
    assert [name for shape, name in rows.items() if shape[1] % 256] == ["img_in.weight"]
    assert sum(weight.numel() for weight in model.parameters()) <= 14e6


def test_the_host_detects_the_saved_model_and_takes_its_lora(training, host, model, tmp_path):
    flow, lora, train = training["flow"], training["lora"], training["train"]
    train.save(train.as_flux_file(model.state_dict()), tmp_path / "tiny_flux.safetensors")
    additions = lora.adapt(train.load_flux(tmp_path / "tiny_flux.safetensors", torch.device("cpu")))
    train.save(lora.state_dict(additions), tmp_path / "tiny_lora.safetensors")
    patcher = host.sd.load_diffusion_model(str(tmp_path / "tiny_flux.safetensors"))
    config = patcher.model.model_config.unet_config
    assert {name: config[name] for name in flow.CONFIG} == flow.CONFIG
    assert patcher.model.model_sampling.shift == 1 == patcher.model.model_sampling.multiplier
    tensors = load_file(tmp_path / "tiny_lora.safetensors")
    adapted, _ = host.sd.load_lora_for_models(patcher, None, tensors, 1.0, 0.0)
    assert len(adapted.patches) == len(additions) == len(tensors) // 3


def test_autoencoder_is_in_the_hosts_format(training, host, tmp_path):
    autoencoder, train = training["autoencoder"], training["train"]
    pictures = scenes.draw(CAPTIONS, torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    vae = autoencoder.build(torch.device("cpu"))
    autoencoder.to_unit_variance(vae, pictures)
    latents = autoencoder.encode(vae, pictures)
    assert latents.shape == (len(CAPTIONS), 16, 16, 16)
    assert latents.std().item() == pytest.approx(1, abs=0.03) and abs(latents.mean()) < 0.05
    train.save(vae.state_dict(), tmp_path / "tiny_vae.safetensors")
    loaded = host.sd.VAE(sd=load_file(tmp_path / "tiny_vae.safetensors"))
    with torch.inference_mode():
        expected = loaded.decode(autoencoder.LATENTS.process_out(latents)).movedim(-1, 1)
    assert torch.allclose(autoencoder.decode(vae, latents), expected, atol=1e-3)


def test_a_few_steps_lower_the_loss(training, prompts):
    flow = training["flow"]
    torch.manual_seed(0)
    model = flow.build(torch.device("cpu"))
    empty = (prompts[0][:1].bfloat16(), prompts[1][:1].bfloat16())
    pool = flow.Pool(torch.full((2, 64, 64), 0.5).bfloat16(), prompts[0].bfloat16(), prompts[1].bfloat16())
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(8):
        # The same noise and times at each step.
        torch.manual_seed(1)
        losses.append(flow.loss_of_batch(model, pool, empty, 2))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
