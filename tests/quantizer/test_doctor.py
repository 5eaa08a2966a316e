"""`doctor` looks at every item, on any machine, says what to do, and changes nothing."""

import json

import pytest
from gguf_native.__main__ import main
from gguf_native.quantizer import doctor

ITEMS = {
    "driver",
    "torch",
    "triton",
    "ComfyUI",
    "DynamicVRAM",
    "transparent huge pages",
    "swappiness",
    "pinned memory",
    "bus to the GPU",
    "free memory on the GPU",
    "free disk",
}
NOWHERE = doctor.Place(None)


def test_every_item_is_looked_at_here(comfyui, capsys):
    assert main(["doctor", "--comfyui", str(comfyui), "--json"]) == 0
    findings = {one["what"]: one for one in json.loads(capsys.readouterr().out)}
    assert findings.keys() == ITEMS
    assert findings["ComfyUI"]["value"].startswith("0.") and findings["ComfyUI"]["ok"]
    for finding in findings.values():
        assert finding["value"]
        assert finding["advice"] or finding["ok"] is not False


def test_the_lines_name_every_item(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {item}: " in shown for item in ITEMS)


def test_a_folder_without_comfyui_is_named(tmp_path):
    assert not doctor.comfyui(doctor.Place(tmp_path)).ok
    assert doctor.comfyui(NOWHERE).ok is None
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.29.1"\n')
    assert "0.29.1" in doctor.comfyui(doctor.Place(tmp_path)).value
    assert not doctor.comfyui(doctor.Place(tmp_path)).ok


def test_a_folder_that_is_not_there_breaks_nothing(tmp_path):
    assert len(doctor.examine(doctor.Place(tmp_path / "absent"))) == len(ITEMS)


# What Linux says in these files -> whether it is fine, and what the command would set.
SYSTEM = [
    ("huge_pages", "HUGE_PAGES", "[always] madvise never", True, ""),
    ("huge_pages", "HUGE_PAGES", "always [madvise] never", False, "echo always"),
    ("swappiness", "SWAPPINESS", "10\n", True, ""),
    ("swappiness", "SWAPPINESS", "60\n", False, "vm.swappiness=10"),
]


@pytest.mark.parametrize(("check", "place", "text", "ok", "command"), SYSTEM)
def test_settings_of_linux(tmp_path, monkeypatch, check, place, text, ok, command):
    file = tmp_path / "setting"
    file.write_text(text)
    monkeypatch.setattr(doctor, place, file)
    finding = getattr(doctor, check)(NOWHERE)
    assert finding.ok is ok
    assert command in finding.command
    assert file.read_text() == text


@pytest.mark.parametrize(("check", "place"), [("huge_pages", "HUGE_PAGES"), ("swappiness", "SWAPPINESS")])
def test_a_system_without_the_setting(tmp_path, monkeypatch, check, place):
    monkeypatch.setattr(doctor, place, tmp_path / "absent")
    finding = getattr(doctor, check)(NOWHERE)
    assert finding.ok is None and finding.value.startswith("no such setting on ")


def test_wsl_is_known_by_its_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "KERNEL", tmp_path / "osrelease")
    assert not doctor.is_wsl()
    doctor.KERNEL.write_text("5.15.167.4-microsoft-standard-WSL2\n")
    assert doctor.is_wsl()


@pytest.mark.parametrize(("version", "numbers"), [("2.8.0+cu128", (2, 8)), ("12.8", (12, 8)), ("2.13.0a0", (2, 13))])
def test_versions_compare_as_numbers(version, numbers):
    assert doctor.numbers(version) == numbers
