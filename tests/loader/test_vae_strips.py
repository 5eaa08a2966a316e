"""A KL decoder in strips of rows: the picture of the plain decoding everywhere, in a fraction of its memory."""

import gc
import logging

import pytest
import torch

pytest.importorskip("comfy", reason="no ComfyUI here: `make test` downloads it, COMFYUI_PATH names one")

import comfy.ldm.modules.diffusionmodules.model as kl
import comfy.model_management
import comfy.ops
import comfy.utils
from comfy.ldm.modules.temporal_ae import VideoDecoder
from comfy.model_patcher import ModelPatcherDynamic
from gguf_native.config import settings
from gguf_native.loader.vae import GGUFVAE, borrowed, can_go_in_strips, load_vae
from gguf_native.loader.vae_strips import Host, Rows, StripDecoder, n_convolutions
from gguf_native.ops.layers import PackedWeight
from sampling import normal

# The last bits of float32; a step of a picture is 1 / 255, and tiles are off by 20 of them.
LAST_BITS = 1e-5
LITTLE = 10**6  # A strip is a row or two then.
CHANNELS = {"tiny_flux_vae": 16, "tiny_sd15_vae": 4}
SMALL = {"ch": 32, "out_ch": 3, "ch_mult": [1, 2], "num_res_blocks": 1, "in_channels": 3, "resolution": 16}
DECODER = SMALL | {"z_channels": 4, "attn_resolutions": []}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def with_little_memory(monkeypatch):
    """Function (vae, free bytes): `vae_slicing` is on, and every picture is too big for what is free."""

    def limit(vae: GGUFVAE, free_bytes: int = LITTLE) -> None:
        monkeypatch.setenv("GGUF_NATIVE_VAE_SLICING", "true")
        settings.cache_clear()
        vae.memory_used_decode = lambda shape, dtype: 1e15
        vae.patcher.get_free_memory = lambda device: free_bytes

    yield limit
    monkeypatch.undo()
    settings.cache_clear()


def loaded(samples, name: str = "tiny_flux_vae", type_name: str = "Q8_0") -> GGUFVAE:
    return load_vae(str(samples.gguf(name, type_name)))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_K", "F16"])
@pytest.mark.parametrize("name", list(CHANNELS))
def test_pictures_are_the_plain_ones(samples, request, caplog, with_little_memory, name, type_name, dynamic):
    if dynamic:
        request.getfixturevalue("dynamic_vram_on_cpu")
    vae = loaded(samples, name, type_name)
    assert isinstance(vae.patcher, ModelPatcherDynamic) == dynamic
    latents = normal(2, CHANNELS[name], 5, 7, seed=1)
    with caplog.at_level(logging.INFO):
        plain = vae.decode(latents)
        assert "strips" not in caplog.text
        with_little_memory(vae)
        assert difference(vae.decode(latents), plain) < LAST_BITS
    assert caplog.text.count("do not fit for one picture: decoding it in strips of rows.") == 2


@pytest.mark.parametrize("free_bytes", [1, LITTLE, 8 * LITTLE, 10**12])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (13, 2), (8, 8)])
def test_any_size_in_strips_of_any_height(samples, with_little_memory, shape, free_bytes):
    vae = loaded(samples)
    latent = normal(1, 16, *shape, seed=1)
    plain = vae.decode(latent)
    with_little_memory(vae, free_bytes)
    assert difference(vae.decode(latent), plain) < LAST_BITS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_is_not_more_than_that_of_the_plain_decoding(samples, with_little_memory, dtype):
    vae = loaded(samples, type_name="F16")
    latent = normal(1, 16, 6, 8, seed=1)
    exact = vae.decode(latent)
    vae.vae_dtype = dtype
    vae.first_stage_model.to(dtype)
    plain = vae.decode(latent)
    assert difference(plain, exact) > 1e-3
    with_little_memory(vae)
    in_strips = vae.decode(latent)
    assert difference(in_strips, exact) < 1.5 * difference(plain, exact)
    assert (in_strips - exact).abs().mean() < 1.1 * (plain - exact).abs().mean()


def test_each_weight_is_decoded_once(samples, monkeypatch, with_little_memory):
    vae = loaded(samples)
    borrow_dense, decoded_layers = PackedWeight.borrow_dense, []
    monkeypatch.setattr(
        PackedWeight, "borrow_dense", lambda layer, *args: decoded_layers.append(layer) or borrow_dense(layer, *args)
    )
    with_little_memory(vae)
    vae.decode(normal(1, 16, 8, 8, seed=1))
    packed = [layer for layer in vae.first_stage_model.decoder.modules() if isinstance(layer, PackedWeight)]
    assert len(packed) > 20
    assert sorted(map(id, decoded_layers)) == sorted(map(id, packed))


def test_progress_goes_to_the_end(samples, monkeypatch, with_little_memory):
    vae = loaded(samples)
    seen = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, *args, **more: seen.append((value, total))
    )
    with_little_memory(vae)
    vae.decode(normal(1, 16, 4, 4, seed=1))
    n = n_convolutions(vae.first_stage_model.decoder)
    assert (seen[0], seen[-1]) == ((1, n), (n, n))


def count_borrowed(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """The layers whose weights are borrowed and not given back."""
    now = []

    def recorded(borrow):
        return lambda layer, *args, **more: now.append(layer) or borrow(layer, *args, **more)

    monkeypatch.setattr(PackedWeight, "borrow_dense", recorded(PackedWeight.borrow_dense))
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", recorded(comfy.ops.cast_bias_weight))
    for owner, name in ((PackedWeight, "give_back"), (comfy.ops, "uncast_bias_weight")):
        monkeypatch.setattr(owner, name, lambda layer, *args: now.remove(layer))
    return now


@pytest.mark.parametrize("strip", [1, 40, 400])
def test_cancel_leaves_nothing(samples, monkeypatch, with_little_memory, strip):
    vae = loaded(samples)
    latent = normal(1, 16, 8, 8, seed=1)
    plain = vae.decode(latent)
    with_little_memory(vae)
    throw, strips = comfy.model_management.throw_exception_if_processing_interrupted, []

    def cancel_once() -> None:
        strips.append(strip)
        comfy.model_management.interrupt_current_processing(len(strips) == strip)
        throw()

    borrowed_now = count_borrowed(monkeypatch)
    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", cancel_once)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        vae.decode(latent)
    assert len(strips) == strip
    assert "forward" not in vars(vae.first_stage_model.decoder)
    assert borrowed_now == []
    gc.collect()
    assert not any(type(thing) is Rows for thing in gc.get_objects())
    assert difference(vae.decode(latent), plain) < LAST_BITS


def filled(decoder: torch.nn.Module) -> torch.nn.Module:
    """The host's layers have whatever was in memory."""
    for seed, (name, parameter) in enumerate(decoder.named_parameters()):
        noise = normal(*parameter.shape, seed=seed)
        scale = 0.02 if parameter.ndim == 1 else (parameter[0].numel()) ** -0.5
        parameter.copy_(noise * scale + (parameter.ndim == 1 and name.endswith("weight")))
    return decoder.eval()


def in_strips(decoder: torch.nn.Module, latent: torch.Tensor, free_bytes: int = LITTLE) -> torch.Tensor:
    host = Host(
        borrow=borrowed,
        attention=comfy.ops.scaled_dot_product_attention,
        free_bytes=lambda: free_bytes,
        pin=comfy.model_management.pin_memory,
        unpin=comfy.model_management.unpin_memory,
        between=lambda: None,
        advance=lambda: None,
    )
    return StripDecoder(decoder, host, latent).decode()


def with_wide_shortcut(**changes) -> torch.nn.Module:
    return kl.ResnetBlock(**changes, conv_shortcut=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attn_resolutions": [8, 16]},
        {"tanh_out": True},
        {"resnet_op": with_wide_shortcut},
        {"ch_mult": [1, 2, 2], "num_res_blocks": 2, "z_channels": 8, "ch": 64},
    ],
)
def test_decoders_that_can_go_in_strips(changes):
    decoder = filled(kl.Decoder(**DECODER | changes))
    assert can_go_in_strips(decoder)
    latent = normal(2, decoder.z_shape[1], 9, 5, seed=1)
    assert difference(in_strips(decoder, latent), decoder(latent)) < LAST_BITS


class OtherBlock(kl.ResnetBlock):
    """Perhaps computes something else."""


def circular(decoder: torch.nn.Module) -> None:
    decoder.conv_in.padding_mode = "circular"


def replaced(decoder: torch.nn.Module) -> None:
    decoder.conv_in._conv_forward = lambda *args: None


def hooked(decoder: torch.nn.Module) -> None:
    decoder.mid.block_1.register_forward_hook(lambda *args: None)


def strided(decoder: torch.nn.Module) -> None:
    decoder.conv_out.stride = (2, 2)


UNKNOWN = {
    "no decoder": lambda: None,
    "another decoder": lambda: torch.nn.Sequential(),
    "convolutions over time": lambda: kl.Decoder(**DECODER | {"conv3d": True}),
    "with attention": lambda: kl.Decoder(**DECODER | {"conv3d": True, "attn_resolutions": [16]}),
    "no convolution after upsampling": lambda: kl.Decoder(**DECODER | {"resamp_with_conv": False}),
    "blocks of another kind": lambda: kl.Decoder(**DECODER | {"resnet_op": OtherBlock}),
    "video": lambda: VideoDecoder(**DECODER, video_kernel_size=[3, 1, 1], alpha=0.0),
}


@pytest.mark.parametrize("kind", list(UNKNOWN))
def test_other_decoders_are_not_taken_for_it(kind):
    decoder = UNKNOWN[kind]()
    assert not can_go_in_strips(decoder if decoder is None else decoder.eval())


@pytest.mark.parametrize("change", [circular, replaced, hooked, strided, torch.nn.Module.train])
def test_changed_decoders_are_not_taken_for_it(change):
    decoder = kl.Decoder(**DECODER).eval()
    assert can_go_in_strips(decoder)
    change(decoder)
    assert not can_go_in_strips(decoder)


def test_norms_do_not_lose_a_small_spread_beside_a_large_mean():
    """Sums of squares in float32 would."""
    norm = filled(comfy.ops.disable_weight_init.GroupNorm(4, 8, eps=1e-6))
    x = normal(2, 8, 9, 6, seed=1) * 0.01 + torch.linspace(100, 1000, 8).view(1, -1, 1, 1)
    rows = Rows(torch.empty(9, 2, 8, 6))
    for start, end in ((0, 4), (4, 8), (8, 9)):
        rows.write(start, x[:, :, start:end])
    scale, shift = rows.scale_and_shift(norm, norm.weight, norm.bias)
    exact = torch.nn.functional.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double(), 1e-6)
    assert difference(x.double() * scale + shift, exact) < 1e-3
    assert torch.equal(rows.strip(0, 9, x.device), x)


def test_ram_is_pinned_once_for_several_activations():
    """A latent that is nowhere stands for one on a GPU without room."""
    pinned = []
    host = Host(
        None,
        None,
        lambda: 0,
        lambda ram: pinned.append(ram.nbytes) or True,
        lambda ram: pinned.remove(ram.nbytes),
        None,
        None,
    )
    strips = StripDecoder(None, host, torch.empty(1, 4, 8, 8, device="meta"))
    first, second = strips._room(8, 1, 4, 8), strips._room(8, 1, 4, 8)
    assert (first.values.shape, first.values.device.type, pinned) == ((8, 1, 4, 8), "cpu", [1024, 1024])
    place = first.values.data_ptr()
    del first
    smaller = strips._room(6, 1, 4, 8)
    assert smaller.values.data_ptr() == place and pinned == [1024, 1024]
    del smaller
    larger = strips._room(8, 1, 8, 8)
    assert pinned == [1024, 2048]
    del second, larger, strips
    assert pinned == []


@pytest.mark.parametrize(("free_bytes", "place"), [(2048, "meta"), (2047, "cpu")])
def test_an_activation_stays_on_the_gpu_while_as_much_remains_free(free_bytes, place):
    host = Host(None, None, lambda: free_bytes, lambda ram: False, None, None, None)
    strips = StripDecoder(None, host, torch.empty(1, 4, 8, 8, device="meta"))
    assert strips._room(8, 1, 4, 8).values.device.type == place


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_does_not_fit_the_gpu_lies_in_ram(dtype):
    """With a megabyte free all large activations do; with much, none."""
    decoder = filled(kl.Decoder(**DECODER)).to("cuda", dtype)
    latent = normal(1, 4, 64, 64, seed=1).to("cuda", dtype)
    pictures, peaks = [], []
    # Convolutions of float32 would otherwise have ten bits, and round by their algorithm, which depends on the shape.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for free_bytes in (LITTLE, 10**12):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            pictures.append(in_strips(decoder, latent, free_bytes))
            peaks.append(torch.cuda.max_memory_allocated() - before)
        plain = decoder(latent)
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    assert difference(pictures[0], pictures[1]) < tolerance
    assert difference(pictures[0], plain) < tolerance
    assert peaks[0] < 0.7 * peaks[1]
