"""What people would write, or pick instead: the peers of speed.py and gpu.py."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from protmae.models.token_layout import real_positions
from protmae.models.v2 import mae_loss


def adamw(m, lr=1e-4):
    return torch.optim.AdamW(m.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)  # as one writes it


def update(m, opt, loss):
    "A training step as one writes it."
    loss.backward()
    torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
    opt.step()
    opt.zero_grad()
    value = loss.item()
    assert math.isfinite(value)


class PlainV5(nn.Module):
    "V5 as the description reads: residues projected and pooled, mask tokens, everything through the encoder."

    def __init__(self, D=960, dim=768, layers=12, heads=12, ff=3072, ddim=256, dlayers=4, dheads=8):
        super().__init__()
        stack = lambda d, h, f, l: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(d, h, f, 0.0, "gelu", batch_first=True, norm_first=True),
            l,
            nn.LayerNorm(d),
            enable_nested_tensor=False,
        )
        self.embed, self.pos = nn.Linear(D, dim), nn.Parameter(torch.randn(1, 1502, dim) * 0.02)
        self.cls, self.mask = (nn.Parameter(torch.randn(1, 1, dim) * 0.02) for _ in range(2))
        self.encoder, self.down, self.dpos = (
            stack(dim, heads, ff, layers),
            nn.Linear(dim, ddim),
            nn.Parameter(torch.randn(1, 48, ddim) * 0.02),
        )
        self.decoder, self.head = stack(ddim, dheads, 4 * ddim, dlayers), nn.Linear(ddim, D)

    def forward(self, x, L):
        B = len(x)
        real = torch.arange(47, device=x.device) < (-(-L // 32))[:, None]
        pad = torch.cat([torch.zeros(B, 1, dtype=torch.bool, device=x.device), ~real], 1)
        at = torch.arange(1502, device=x.device) < L[:, None]
        pool = lambda v: (
            F.pad(v * at[..., None], (0, 0, 0, 2)).view(B, 47, 32, -1).sum(2)
            / F.pad(at.float(), (0, 2)).view(B, 47, 32).sum(2).clamp(min=1)[..., None]
        )
        truth, t = pool(x), pool(self.embed(x) + self.pos)
        mask = (
            torch.rand(B, 47, device=x.device).masked_fill(~real, 2).argsort(1).argsort(1)
            < (real.sum(1) * 0.75).long().clamp(min=1)[:, None]
        )
        t = torch.where(mask[..., None], self.mask, t)
        t = self.encoder(torch.cat([self.cls.expand(B, -1, -1), t], 1), src_key_padding_mask=pad)
        r = self.head(self.decoder(self.down(t) + self.dpos, src_key_padding_mask=pad))[:, 1:]
        return F.mse_loss(r[mask], truth[mask])


def vitmae(D=960, dim=768, layers=12, heads=12, ff=3072, ddim=256, dlayers=4, dheads=8):
    "transformers' ViTMAE on 47 patches in a row: its square picture is replaced where it looks at the shape."
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    m = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=ff,
            image_size=7,
            patch_size=1,
            num_channels=D,
            mask_ratio=0.75,
            decoder_hidden_size=ddim,
            decoder_num_hidden_layers=dlayers,
            decoder_num_attention_heads=dheads,
            decoder_intermediate_size=4 * ddim,
        )
    )
    e = m.vit.embeddings
    e.patch_embeddings.image_size, e.patch_embeddings.num_patches, e.num_patches = (1, 47), 47, 47
    e.position_embeddings, m.decoder.decoder_pos_embed = (
        nn.Parameter(torch.zeros(1, 48, d), requires_grad=False) for d in (dim, ddim)
    )
    m.decoder.decoder_pred = nn.Linear(ddim, D)

    def loss(patches):
        o = m.vit(patches.transpose(1, 2)[:, :, None])
        r = m.decoder(o.last_hidden_state, o.ids_restore).logits
        return (((r - patches) ** 2).mean(-1) * o.mask).sum() / o.mask.sum()

    return m, loss


class PlainV2(nn.Module):
    "V2 with torch's own encoder, padding masked."

    def __init__(self, D=960, dim=512, layers=4, heads=16, ff=2048):
        super().__init__()
        self.embed, self.compress_head = nn.Linear(D, dim), nn.Linear(dim, D)
        self.mask_token, self.pos_embed = (
            nn.Parameter(torch.randn(1, 1, dim) * 0.02),
            nn.Parameter(torch.randn(1, 1502, dim) * 0.02),
        )
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(dim, heads, ff, 0.0, batch_first=True), layers, enable_nested_tensor=False
        )
        self.decoder = nn.Sequential(nn.Linear(dim, ff), nn.GELU(), nn.Linear(ff, D))

    def forward(self, x, L):
        at = real_positions(L, x.shape[1])
        mask = torch.rand(at.shape, device=x.device).masked_fill(~at, 2).argsort(1).argsort(1) < (L // 2)[:, None]
        h = self.encoder(
            torch.where(mask[..., None], self.mask_token, self.embed(x)) + self.pos_embed, src_key_padding_mask=~at
        )
        return mae_loss(self.decoder(h), x, mask, self.compress_head((h * at[..., None]).sum(1) / L[:, None]), L)
