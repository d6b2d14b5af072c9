"""Makes pytorch_sasrec.pt and pytorch_sasrec.npz: a tiny SASRec of the published PyTorch layout.

    python tests/goldens/make_pytorch_sasrec.py      # needs PyTorch

The module is written after the description of that layout: queries layer-normed, keys and values
not, torch's multi-head attention with a causal mask and no key padding mask, two convolutions of
width one, padding places zeroed before every block and at the end; item 0 is padding.
"""

from pathlib import Path

import numpy as np
import torch

ITEMS, UNITS, LENGTH, BLOCKS = 11, 8, 5, 2
HISTORIES = [[1, 2, 3, 4, 5], [0, 0, 7, 11, 7], [0, 0, 0, 0, 9]]


class FeedForward(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv1d(UNITS, UNITS, 1)
        self.conv2 = torch.nn.Conv1d(UNITS, UNITS, 1)

    def forward(self, x):
        return x + self.conv2(torch.relu(self.conv1(x.mT))).mT


class SASRec(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.item_emb = torch.nn.Embedding(ITEMS + 1, UNITS, padding_idx=0)
        self.pos_emb = torch.nn.Embedding(LENGTH, UNITS)

        def norms(count):
            return torch.nn.ModuleList(torch.nn.LayerNorm(UNITS, eps=1e-8) for _ in range(count))

        self.attention_layernorms, self.forward_layernorms = norms(BLOCKS), norms(BLOCKS)
        attention = [torch.nn.MultiheadAttention(UNITS, 1) for _ in range(BLOCKS)]
        self.attention_layers = torch.nn.ModuleList(attention)
        self.forward_layers = torch.nn.ModuleList(FeedForward() for _ in range(BLOCKS))
        self.last_layernorm = norms(1)[0]

    def forward(self, history):
        real = (history != 0).unsqueeze(-1)
        x = (self.item_emb(history) * UNITS**0.5 + self.pos_emb.weight) * real
        later = ~torch.tril(torch.ones(LENGTH, LENGTH, dtype=torch.bool))
        for block in range(BLOCKS):
            query = self.attention_layernorms[block](x)
            query, source = query.transpose(0, 1), x.transpose(0, 1)
            attended, _ = self.attention_layers[block](query, source, source, attn_mask=later)
            x = self.forward_layernorms[block]((query + attended).transpose(0, 1))
            x = self.forward_layers[block](x) * real
        return self.last_layernorm(x)[:, -1]


def main():
    torch.manual_seed(0)
    model = SASRec().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that each is tested
            parameter.add_(0.3 * torch.randn_like(parameter))
        vectors = model(torch.tensor(HISTORIES))
        logits = vectors @ model.item_emb.weight[1:].T
    folder = Path(__file__).parent
    torch.save(model.state_dict(), folder / "pytorch_sasrec.pt")
    arrays = {"vectors": vectors.numpy(), "logits": logits.numpy()}
    np.savez(folder / "pytorch_sasrec.npz", histories=np.array(HISTORIES), **arrays)


if __name__ == "__main__":
    main()
