"""What people would write, or pick instead: the peers of speed.py and gpu.py."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from protmae.core import DIM, MAX_LEN, N_PATCHES, PATCH_SIZE
from protmae.models.token_layout import real_positions
from protmae.models.v2 import mae_loss

TINY_PEER_V5 = dict(dim=96, layers=2, heads=4, ff=192, decoder_dim=32, decoder_layers=1, decoder_heads=4)
TINY_PEER_V2 = dict(dim=64, layers=1, heads=4, ff=128)


def adamw(model, lr=1e-4):
    "The optimiser as one writes it."
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)


def update(model, optimizer, loss):
    "A training step as one writes it."
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    value = loss.item()
    assert math.isfinite(value)


def small_parameter(*shape):
    return nn.Parameter(torch.randn(*shape) * 0.02)


def pre_norm_stack(dim, heads, ff, layers):
    "torch's own transformer encoder, with the norm in front."
    layer = nn.TransformerEncoderLayer(dim, heads, ff, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(dim), enable_nested_tensor=False)


def lowest_ranks(real, counts):
    "A random choice of `counts` (B,) of the real places (B, N) of each row."
    noise = torch.rand(real.shape, device=real.device).masked_fill(~real, 2)
    return noise.argsort(1).argsort(1) < counts[:, None]


class PlainV5(nn.Module):
    "V5 as the description reads: residues projected and pooled, mask tokens, everything through the encoder."

    def __init__(
        self,
        input_dim=DIM,
        dim=768,
        layers=12,
        heads=12,
        ff=3072,
        decoder_dim=256,
        decoder_layers=4,
        decoder_heads=8,
    ):
        super().__init__()
        self.embed, self.pos = nn.Linear(input_dim, dim), small_parameter(1, MAX_LEN, dim)
        self.cls, self.mask = small_parameter(1, 1, dim), small_parameter(1, 1, dim)
        self.encoder = pre_norm_stack(dim, heads, ff, layers)
        self.down = nn.Linear(dim, decoder_dim)
        self.decoder_pos = small_parameter(1, N_PATCHES + 1, decoder_dim)
        self.decoder = pre_norm_stack(decoder_dim, decoder_heads, 4 * decoder_dim, decoder_layers)
        self.head = nn.Linear(decoder_dim, input_dim)

    @staticmethod
    def pool(x, at):
        "(B, L, D) residues and (B, L) which of them are real -> (B, 47, D) means of windows."
        B, missing = len(x), N_PATCHES * PATCH_SIZE - MAX_LEN
        sums = F.pad(x * at[..., None], (0, 0, 0, missing)).view(B, N_PATCHES, PATCH_SIZE, -1).sum(2)
        counts = F.pad(at.float(), (0, missing)).view(B, N_PATCHES, PATCH_SIZE).sum(2)
        return sums / counts.clamp(min=1)[..., None]

    def forward(self, x, lengths):
        "(B, 1502, D), (B,) -> the loss on masked patches."
        B, at = len(x), real_positions(lengths, MAX_LEN)
        real = real_positions(-(-lengths // PATCH_SIZE), N_PATCHES)
        padding = torch.cat([torch.zeros(B, 1, dtype=torch.bool, device=x.device), ~real], 1)
        truth, tokens = self.pool(x, at), self.pool(self.embed(x) + self.pos, at)
        mask = lowest_ranks(real, (real.sum(1) * 0.75).long().clamp(min=1))
        tokens = torch.where(mask[..., None], self.mask, tokens)
        tokens = torch.cat([self.cls.expand(B, -1, -1), tokens], 1)
        tokens = self.down(self.encoder(tokens, src_key_padding_mask=padding)) + self.decoder_pos
        rebuilt = self.head(self.decoder(tokens, src_key_padding_mask=padding))[:, 1:]
        return F.mse_loss(rebuilt[mask], truth[mask])


def vitmae(
    input_dim=DIM,
    dim=768,
    layers=12,
    heads=12,
    ff=3072,
    decoder_dim=256,
    decoder_layers=4,
    decoder_heads=8,
):
    "transformers' ViTMAE on 47 patches in a row: its square picture is replaced where it looks at the shape."
    from transformers import ViTMAEConfig, ViTMAEForPreTraining  # here: the other peers do without it

    config = ViTMAEConfig(
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=ff,
        image_size=7,
        patch_size=1,
        num_channels=input_dim,
        mask_ratio=0.75,
        decoder_hidden_size=decoder_dim,
        decoder_num_hidden_layers=decoder_layers,
        decoder_num_attention_heads=decoder_heads,
        decoder_intermediate_size=4 * decoder_dim,
    )
    model = ViTMAEForPreTraining(config)
    embeddings = model.vit.embeddings
    embeddings.image_size = embeddings.patch_embeddings.image_size = (1, N_PATCHES)
    embeddings.num_patches = embeddings.patch_embeddings.num_patches = N_PATCHES
    # not zeros: an empty patch would be a constant token, and the norm's epsilon of 1e-12 blows its gradient up
    positions = [small_parameter(1, N_PATCHES + 1, d).requires_grad_(False) for d in (dim, decoder_dim)]
    embeddings.position_embeddings, model.decoder.decoder_pos_embed = positions
    model.decoder.decoder_pred = nn.Linear(decoder_dim, input_dim)
    return model


def vitmae_loss(model, patches):
    "(B, 47, D) -> the loss on masked patches."
    out = model.vit(patches.transpose(1, 2)[:, :, None])
    rebuilt = model.decoder(out.last_hidden_state, out.ids_restore).logits
    return (((rebuilt - patches) ** 2).mean(-1) * out.mask).sum() / out.mask.sum()


class PlainV2(nn.Module):
    "V2 with torch's own encoder, padding masked."

    def __init__(self, input_dim=DIM, dim=512, layers=4, heads=16, ff=2048):
        super().__init__()
        self.embed, self.compress_head = nn.Linear(input_dim, dim), nn.Linear(dim, input_dim)
        self.mask_token, self.pos_embed = small_parameter(1, 1, dim), small_parameter(1, MAX_LEN, dim)
        layer = nn.TransformerEncoderLayer(dim, heads, ff, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.decoder = nn.Sequential(nn.Linear(dim, ff), nn.GELU(), nn.Linear(ff, input_dim))

    def forward(self, x, lengths):
        "(B, 1502, D), (B,) -> the loss on masked residues, with the compressed vector's."
        at = real_positions(lengths, x.shape[1])
        mask = lowest_ranks(at, lengths // 2)
        tokens = torch.where(mask[..., None], self.mask_token, self.embed(x)) + self.pos_embed
        tokens = self.encoder(tokens, src_key_padding_mask=~at)
        compressed = self.compress_head((tokens * at[..., None]).sum(1) / lengths[:, None])
        return mae_loss(self.decoder(tokens), x, mask, compressed, lengths)
