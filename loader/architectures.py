"""What GGUF files lose of a diffusion model's tensors, as data; which model a file holds is for the host to detect."""

# Names whose leading dimensions of one ggml drops, and how many dimensions the model wants.
LEADING_ONES = {
    "pos_embed": 3,  # SD3
    "positional_encoding": 3,  # AuraFlow
    "register_tokens": 3,  # AuraFlow
    ".modulation": 3,  # Wan
    "img_emb.emb_pos": 3,  # Wan
    "x_pad_token": 2,  # Z-Image
    "cap_pad_token": 2,  # Z-Image
}
