"""Where ComfyUI looks for GGUF files: the folder keys that the ecosystem's workflows use."""

import folder_paths

# Our key: the host's key whose folders it shares.
SHARED = {"unet_gguf": "diffusion_models", "clip_gguf": "text_encoders", "vae_gguf": "vae"}


def register() -> None:
    """Add our folder keys; a key that another pack has made gets what it lacks and loses nothing."""
    for key, host_key in SHARED.items():
        host_folders = folder_paths.get_folder_paths(host_key)
        folders, extensions = folder_paths.folder_names_and_paths.get(key, ([], set()))
        folders = folders + [folder for folder in host_folders if folder not in folders]
        folder_paths.folder_names_and_paths[key] = (folders, set(extensions) | {".gguf"})


def files(key: str) -> list[str]:
    """Files that the host lists under a folder key."""
    return folder_paths.get_filename_list(key)


def files_of_both_kinds(key: str) -> list[str]:
    """GGUF files of one of our keys and what the host lists under the key that it shares."""
    return sorted({*folder_paths.get_filename_list(SHARED[key]), *folder_paths.get_filename_list(key)})


def full_path(key: str, name: str) -> str:
    """Path of a file listed by `files` or `files_of_both_kinds`; the host's FileNotFoundError if it is gone."""
    return folder_paths.get_full_path_or_raise(key if name.lower().endswith(".gguf") else SHARED[key], name)
