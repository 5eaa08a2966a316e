"""The node GGUFRecommend in the real server, and its table in the page."""

import pytest
import torch
from host import browser
from host.workflows import node

GRAPH = {"advice": node("GGUFRecommend", model="sd1", vram=4.0)}


def test_the_node_shows_its_table(server):
    (text,) = server.run(GRAPH).outputs["advice"]["text"]
    head, *lines = text.splitlines()
    assert head.startswith("Stable Diffusion 1.5 on ") and "4.0 GiB on the card" in head
    assert any(line.startswith("Q4_K_M ") for line in lines)
    assert lines[-1].startswith("Take ")


def test_without_a_size_it_asks_for_the_whole_card(host, monkeypatch):
    """What is free of it now is not what a file will find."""
    from gguf_native.nodes import recommend
    from gguf_native.quantizer.measure import Device

    device, asked, freed = Device(torch.device("cuda", 0), "a card", 2 << 30, 8 << 30), [], []
    monkeypatch.setattr(recommend, "find_device", lambda: device)
    monkeypatch.setattr(recommend, "recommend", lambda model, vram: asked.append(vram))
    monkeypatch.setattr(recommend, "lines", lambda advice: ["text"])
    monkeypatch.setattr(recommend.comfy.model_management, "free_memory", lambda *of: freed.append(of))
    recommend.GGUFRecommend.execute("flux", 0.0)
    recommend.GGUFRecommend.execute("flux", 6.0)
    assert asked == [8 << 30, 6 << 30]
    assert freed == [(recommend.ROOM, device.device)] * 2


def test_its_output_is_text_for_other_nodes(server):
    graph = GRAPH | {"shown": node("PreviewAny", source=["advice", 0])}
    outputs = server.run(graph).outputs
    assert outputs["shown"]["text"] == outputs["advice"]["text"]


@pytest.mark.skipif(not (browser.CHROMIUM and browser.CHROMEDRIVER), reason=browser.NO_BROWSER)
def test_the_page_shows_the_table_in_the_node(server):
    with browser.open_page(server.url) as page:
        page.driver.execute_script("app.graph.clear(); app.graph.add(LiteGraph.createNode('GGUFRecommend'))")
        page.set_widget("GGUFRecommend", "model", "sd1")
        page.driver.execute_async_script("app.queuePrompt(0, 1).then(arguments[0])")
        page.wait("document.querySelector('.widget-text-preview textarea')?.value.includes('Q4_K_M')")
