"""What is trained is what the host runs: its text, its model, its file formats."""

import functools

import pytest
import torch
from gguf_native.training import scenes
from safetensors.torch import load_file

CAPTIONS = scenes.random_captions(3, seed=1)


@pytest.fixture(scope="module")
def training(host):
    """The modules that import comfy, in its training mode."""
    from gguf_native.training import autoencoder, engine, flow, lora, text, train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.model_management, "in_training", True)
        yield {"autoencoder": autoencoder, "engine": engine, "flow": flow, "lora": lora, "text": text, "train": train}


@pytest.fixture
def model(training):
    torch.manual_seed(0)
    model = training["flow"].build(torch.device("cpu"))
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter.data, std=0.02)
    return model


@pytest.fixture(scope="module")
def clip(training):
    return training["engine"].load_clip()


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 77, 768, generator=generator), torch.randn(2, 768, generator=generator)


def test_text_is_that_of_the_hosts_node(training, clip):
    sentences = [*map(str, CAPTIONS), ""]
    context, pooled = training["engine"].encode(clip, sentences, torch.device("cpu"))
    for number, sentence in enumerate(sentences):
        ((expected, extra),) = clip.encode_from_tokens_scheduled(clip.tokenize(sentence))
        assert torch.allclose(context[number].float(), expected[0], atol=0.02)
        assert torch.allclose(pooled[number].float(), extra["pooled_output"][0], atol=0.02)


def test_first_tokens_are_those_of_the_whole_text(training, clip):
    sentences, cpu = [*map(str, CAPTIONS), ""], torch.device("cpu")
    tokens = training["text"].TOKENS
    whole, shortened = (training["engine"].encode(clip, sentences, cpu, count) for count in (77, tokens))
    for one, other in zip((whole[0][:, :tokens], whole[1]), shortened, strict=True):
        assert (one.float() - other.float()).norm() < 0.02 * one.float().norm()


def test_text_layers_tell_words_apart_that_the_encoder_hardly_does(training, clip, model):
    text, cpu = training["text"], torch.device("cpu")
    text.set_text_layers(model, clip, cpu, count=64)
    red, blue = (f"a large {colour} circle on a green background" for colour in ("red", "blue"))
    context, _ = training["engine"].encode(clip, [red, blue], cpu, text.TOKENS)
    with torch.no_grad():
        features, tokens = context[:, 3].float(), model.txt_in(context[:, 3].float())
    assert torch.cosine_similarity(*features, dim=0) > 0.8
    assert torch.cosine_similarity(*tokens, dim=0) < 0.6


def test_every_word_has_its_place(training):
    text = training["text"]
    for caption in scenes.random_captions(50, seed=2):
        tokens = torch.tensor(text.token_targets(caption))
        words = [text.WORDS[row.argmax()] for row in tokens[:, : len(text.WORDS)] if row.any()]
        assert [word for word in str(caption).split() if word != "background"] == words
        roles = tokens[:, len(text.WORDS) : len(text.WORDS) + len(text.ROLES)]
        assert len(tokens) == text.TOKENS and (roles.sum(1) == 1).all()
        assert sum(text.pooled_targets(caption)) == 1 + 3 * len(caption.things) + bool(caption.relation)


def test_velocity_is_that_of_the_hosts_forward(training, model, prompts):
    flow, latents, time = training["flow"], torch.randn(2, 16, 16, 16), torch.tensor([0.2, 1.0])
    with torch.no_grad():
        own = flow.to_latents(flow.velocity(model, flow.to_tokens(latents), time, *prompts))
        assert own.abs().max() > 0.01
        assert torch.allclose(own, model(latents, time, *prompts), atol=1e-5)


def test_the_last_token_of_a_short_text_stands_for_all_that_are_like_it(training, model, prompts):
    flow, latents, time = training["flow"], torch.randn(2, 16, 16, 16), torch.tensor([0.2, 1.0])
    short, pooled = prompts[0][:, :16], prompts[1]
    whole = torch.cat((short, short[:, -1:].expand(-1, 77 - 16, -1)), 1)
    with torch.no_grad():
        own = flow.to_latents(flow.velocity(model, flow.to_tokens(latents), time, short, pooled))
        assert torch.allclose(own, model(latents, time, whole, pooled), atol=1e-4)
        assert not torch.allclose(own, model(latents, time, short, pooled), atol=1e-4)


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
    pictures = scenes.draw(scenes.random_captions(32, seed=1), torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    vae = autoencoder.build(torch.device("cpu"))
    with torch.no_grad():
        autoencoder.set_encoder(vae, *autoencoder.components(pictures))
    latents = autoencoder.encode(vae, pictures)
    assert latents.shape == (32, 16, 16, 16)
    assert latents.std().item() == pytest.approx(1, abs=0.03) and abs(latents.mean()) < 0.05
    train.save(vae.state_dict(), tmp_path / "tiny_vae.safetensors")
    loaded = host.sd.VAE(sd=load_file(tmp_path / "tiny_vae.safetensors"))
    with torch.inference_mode():
        encoded = autoencoder.LATENTS.process_in(loaded.encode(pictures[:3].movedim(1, -1)))
        expected = loaded.decode(autoencoder.LATENTS.process_out(latents[:3])).movedim(-1, 1)
    assert torch.allclose(encoded, latents[:3], atol=0.01)
    assert torch.allclose(autoencoder.decode(vae, latents[:3]), expected, atol=0.02)


def test_orthogonal_brings_singular_values_near_one(training):
    from gguf_native.training import optimise

    for shape in ((64, 256), (256, 64)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(4))
        values = torch.linalg.svdvals(optimise.orthogonal(matrix))
        assert values.min() > 0.5 and values.max() < 1.4


def test_a_few_steps_lower_the_loss(training, model, prompts):
    flow = training["flow"]
    empty = (prompts[0][:1, :16].bfloat16(), prompts[1][:1].bfloat16())
    pool = flow.Pool(torch.full((2, 64, 64), 0.5).bfloat16(), prompts[0][:, :16].bfloat16(), prompts[1].bfloat16())
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(8):
        # The same noise and times at each step.
        torch.manual_seed(1)
        losses.append(flow.loss_of_batch(functools.partial(flow.velocity, model), pool, empty, 2))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
