"""Plain PyTorch renderings of the CF models' papers, for cf.py: written as most people would.

Items are 1..I, 0 is padding; windows lie in memory as tensors. Losses, widths, batches, epochs and
early stopping are those of the task. Dropout, initialisation and optimisers are PyTorch's own.

Axis letters: B batch, S positions of a history, P supervised places, I items, D width.
"""

import copy
import dataclasses
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tca4rec_jax.cf.windows import FlatRows, users_of, windows_at


class SASRec(nn.Module):
    """The layout of pmixer/SASRec.pytorch."""

    def __init__(self, c):
        super().__init__()
        D = c.units
        self.item, self.position = (
            nn.Embedding(c.num_items + 1, D, 0),
            nn.Embedding(c.history_length, D),
        )
        nn.init.normal_(self.item.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        self.dropout = nn.Dropout(c.dropout)

        def norms():
            return nn.ModuleList(nn.LayerNorm(D, eps=1e-8) for _ in range(c.blocks))

        self.norm1, self.norm2, self.last = norms(), norms(), nn.LayerNorm(D, eps=1e-8)
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(D, c.heads, c.dropout, batch_first=True) for _ in range(c.blocks)
        )
        self.forward_ = nn.ModuleList(
            nn.Sequential(
                nn.Linear(D, D),
                nn.Dropout(c.dropout),
                nn.ReLU(),
                nn.Linear(D, D),
                nn.Dropout(c.dropout),
            )
            for _ in range(c.blocks)
        )
        self.scale, S = D**0.5, c.history_length
        self.register_buffer("later", ~torch.tril(torch.ones(S, S, dtype=torch.bool)))

    def hidden(self, history):
        real = (history != 0).unsqueeze(-1)
        x = self.dropout(self.item(history) * self.scale + self.position.weight) * real
        layers = zip(self.norm1, self.attention, self.norm2, self.forward_, strict=True)
        for norm1, attention, norm2, forward in layers:
            query = norm1(x)
            x = query + attention(query, x, x, attn_mask=self.later, need_weights=False)[0]
            x = norm2(x)
            x = (x + forward(x)) * real
        return self.last(x)

    def user_vectors(self, history):
        return self.hidden(history)[:, -1]

    def queries(self, history, target, user, last_only):
        hidden = self.hidden(history)
        return (hidden[:, -1:], target[:, -1:]) if last_only else (hidden, target)

    def items(self):
        return self.item.weight, None


class GRU4Rec(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.item = nn.Embedding(c.num_items + 1, c.units, 0)
        nn.init.normal_(self.item.weight, std=0.02)
        self.gru = nn.GRU(c.units, c.units, c.layers, batch_first=True, dropout=c.dropout)
        self.output, self.dropout = nn.Linear(c.units, c.units), nn.Dropout(c.dropout)

    def hidden(self, history):
        return self.output(self.gru(self.dropout(self.item(history)))[0])

    user_vectors, queries, items = SASRec.user_vectors, SASRec.queries, SASRec.items


class Caser(nn.Module):
    """Without the user's embedding, as ours."""

    def __init__(self, c):
        super().__init__()
        D, S = c.units, c.history_length
        self.item, self.out = nn.Embedding(c.num_items + 1, D, 0), nn.Embedding(c.num_items + 1, D)
        nn.init.normal_(self.item.weight, std=1 / D)
        nn.init.normal_(self.out.weight, std=1 / D)
        self.bias = nn.Parameter(torch.zeros(c.num_items + 1))
        self.horizontal = nn.ModuleList(nn.Conv2d(1, c.horizontal, (h, D)) for h in range(1, S + 1))
        self.vertical = nn.Conv2d(1, c.vertical, (S, 1))
        self.full = nn.Linear(S * c.horizontal + c.vertical * D, D)
        self.dropout = nn.Dropout(c.dropout)

    def user_vectors(self, history):
        image = self.item(history).unsqueeze(1)
        found = [F.relu(conv(image)).squeeze(3).max(2).values for conv in self.horizontal]
        found.append(self.vertical(image).flatten(1))
        return F.relu(self.full(self.dropout(torch.cat(found, 1))))

    def queries(self, history, target, user, last_only):
        return self.user_vectors(history).unsqueeze(1), target[:, -1:]

    def items(self):
        return self.out.weight, self.bias


class BERT4Rec(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, self.mask, self.share = c.units, c.num_items + 1, c.masked
        self.item = nn.Embedding(c.num_items + 2, D, 0)
        self.position = nn.Embedding(c.history_length + 1, D)
        layer = nn.TransformerEncoderLayer(
            D, c.heads, 4 * D, c.dropout, "gelu", batch_first=True, norm_first=False
        )
        self.encoder = nn.TransformerEncoder(layer, c.blocks, enable_nested_tensor=False)
        self.norm, self.dropout = nn.LayerNorm(D), nn.Dropout(c.dropout)
        self.head = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D))
        self.bias = nn.Parameter(torch.zeros(c.num_items + 1))
        for table in (self.item, self.position):
            nn.init.trunc_normal_(table.weight, std=0.02)

    def hidden(self, tokens):
        x = self.dropout(self.norm(self.item(tokens) + self.position.weight))
        return self.head(self.encoder(x, src_key_padding_mask=tokens == 0))

    def user_vectors(self, history):
        return self.hidden(F.pad(history, (0, 1), value=self.mask))[:, -1]

    def queries(self, history, target, user, last_only):
        tokens = torch.cat([history, target[:, -1:]], 1)
        last = torch.zeros_like(tokens, dtype=torch.bool)
        last[:, -1] = True
        cloze = (torch.rand(tokens.shape) < self.share) & (tokens != 0)
        masked = torch.where(torch.rand(len(tokens), 1) < 0.5, cloze, last)
        hidden = self.hidden(torch.where(masked, self.mask, tokens))
        return hidden, torch.where(masked, tokens, 0)

    def items(self):
        return self.item.weight[:-1], self.bias


class BPRMF(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.user = nn.Embedding(c.num_users, c.units)
        self.item = nn.Embedding(c.num_items + 1, c.units, 0)
        nn.init.normal_(self.user.weight, std=0.1)
        nn.init.normal_(self.item.weight, std=0.1)
        self.bias = nn.Parameter(torch.zeros(c.num_items + 1))

    def known(self):
        return self.user.weight

    def queries(self, history, target, user, last_only):
        return self.user(user).unsqueeze(1), target[:, -1:]

    def items(self):
        return self.item.weight, self.bias


class LightGCN(nn.Module):
    def __init__(self, c, train):
        super().__init__()
        self.sizes, self.layers = (c.num_users, c.num_items + 1), c.layers
        self.nodes = nn.Embedding(sum(self.sizes), c.units)
        nn.init.normal_(self.nodes.weight, std=0.1)
        pairs = np.unique(np.stack([users_of(train), train.items + 1]), axis=1)
        user, item = torch.from_numpy(pairs).long()
        item = item + c.num_users
        index = torch.stack([torch.cat([user, item]), torch.cat([item, user])])
        degree = torch.bincount(index[0], minlength=sum(self.sizes)).clamp(min=1).float()
        value = (degree[index[0]] * degree[index[1]]).rsqrt()
        size = (sum(self.sizes),) * 2
        self.graph = torch.sparse_coo_tensor(index, value, size).coalesce().to_sparse_csr()

    def smoothed(self):
        layers = [self.nodes.weight]
        for _ in range(self.layers):
            layers.append(self.graph @ layers[-1])
        return torch.stack(layers).mean(0).split(self.sizes)

    def known(self):
        return self.smoothed()[0]

    def queries(self, history, target, user, last_only):
        users, self._table = self.smoothed()
        return users[user].unsqueeze(1), target[:, -1:]

    def items(self):
        return (self._table if self.training else self.smoothed()[1]), None


MODULES = {
    "sasrec": SASRec,
    "gru4rec": GRU4Rec,
    "caser": Caser,
    "bert4rec": BERT4Rec,
    "bpr_mf": BPRMF,
}


def rendering(name, task) -> tuple[float, float]:
    """(NDCG@10 of the test rows, seconds) of a model's rendering on the task."""
    began = time.perf_counter()
    if name == "ease":
        return ease(task), time.perf_counter() - began
    torch.manual_seed(task.training.seed)
    c = task.architecture
    model = LightGCN(c, task.train) if name == "lightgcn" else MODULES[name](c)
    ranked = known_ndcg if hasattr(model, "known") else ndcg10
    best, best_state, waited = -1.0, None, 0
    for _ in epochs(model, task):
        value = ranked(model, task, task.validation)
        waited += 1
        if value > best:
            best, best_state, waited = value, copy.deepcopy(model.state_dict()), 0
        if waited >= task.training.patience:
            break
    seconds = time.perf_counter() - began
    model.load_state_dict(best_state)
    return ranked(model, task, task.test), seconds


def epochs(model, task):
    """Trains; yields after every epoch."""
    t, length = task.training, task.architecture.history_length
    windows = windows_at(FlatRows.of(task.train), np.arange(len(task.train.items)), length)
    history, target, user = (torch.from_numpy(np.array(part)).long() for part in windows)
    history, target = history + 1, target + 1
    seen = None
    if t.negatives_outside == "user":
        seen = torch.zeros(int(user.max()) + 1, task.architecture.num_items + 1, dtype=torch.bool)
        seen[user, target[:, -1]] = True
    positions = torch.arange(len(history))
    if t.targets == "last":
        positions = torch.from_numpy(task.train.last_positions)
    per_epoch = len(positions) // (length if t.targets == "all" else 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=t.learning_rate)
    for _ in range(t.max_epochs):
        model.train()
        chosen = positions[torch.randperm(len(positions))[:per_epoch]]
        for batch in chosen.split(t.batch_size):
            loss = loss_of(model, t, history[batch], target[batch], user[batch], seen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield


def loss_of(model, t, history, target, user, seen):
    vectors, target_BxP = model.queries(history, target, user, t.targets != "all")
    table, bias = model.items()
    supervised = target_BxP != 0
    if t.loss == "softmax":
        logits = vectors[supervised] @ table[1:].T
        logits = logits if bias is None else logits + bias[1:]
        return F.cross_entropy(logits, target_BxP[supervised] - 1)
    shape = (*target_BxP.shape, t.negatives)
    negative = torch.randint(1, len(table), shape)
    window = torch.cat([history, target[:, -1:]], 1)
    for _ in range(10):  # drawn again where an item was seen
        if seen is None:
            bad = (negative.unsqueeze(-1) == window[:, None, None]).any(-1)
        else:
            bad = seen[user[:, None, None], negative]
        if not bad.any():
            break
        negative[bad] = torch.randint(1, len(table), (int(bad.sum()),))

    def logits_of(items):
        products = (vectors.unsqueeze(2) * table[items]).sum(-1)
        return products if bias is None else products + bias[items]

    positive, negative = logits_of(target_BxP.unsqueeze(-1)), logits_of(negative)
    if t.loss == "bpr":
        loss = F.softplus(negative - positive).mean(-1)
    else:
        loss = F.softplus(-positive).squeeze(-1) + F.softplus(negative).mean(-1)
    return loss[supervised].mean()


def sasrec_epochs(task) -> tuple[list[float], float]:
    """Seconds of each epoch of SASRec, and processor seconds of all; the first warms up."""
    training = dataclasses.replace(task.training, max_epochs=task.training.max_epochs + 1)
    running = epochs(SASRec(task.architecture), dataclasses.replace(task, training=training))
    next(running)
    began, clock = time.process_time(), [time.perf_counter()]
    for _ in running:
        clock.append(time.perf_counter())
    return np.diff(clock).tolist(), time.process_time() - began


@torch.no_grad()
def ndcg10(model, task, rows) -> float:
    """Full ranking of rows whose last item is the target."""
    model.eval()
    history, target = rows.histories_and_targets(task.architecture.history_length)
    history, target = (torch.from_numpy(part).long() + 1 for part in (history, target))
    table, bias = model.items()
    total = 0.0
    for part, goal in zip(history.split(1024), target.split(1024), strict=True):
        logits = model.user_vectors(part) @ table.T
        total += _gain(logits if bias is None else logits + bias, goal)
    return total / len(target)


@torch.no_grad()
def known_ndcg(model, task, rows) -> float:
    """Each known user's last item of the rows among those he had not had before."""
    model.eval()
    history, target = rows.histories_and_targets(int(rows.lengths.max()) - 1)
    history, target = (torch.from_numpy(part).long() + 1 for part in (history, target))
    table, bias = model.items()
    logits = model.known() @ table.T
    logits = logits if bias is None else logits + bias
    kept = logits.gather(1, target[:, None])
    logits = logits.scatter(1, history, -torch.inf).scatter(1, target[:, None], kept)
    return _gain(logits, target) / len(target)


def _gain(logits, target) -> float:
    logits[:, 0] = -torch.inf
    rank = (logits > logits.gather(1, target[:, None])).sum(1)
    return float(torch.where(rank < 10, 1 / torch.log2(rank + 2.0), 0.0).sum())


def ease(task) -> float:
    """NDCG@10 of the closed form, in NumPy float64."""
    c, train, test = task.architecture, task.train, task.test
    x = np.zeros((int(users_of(train).max()) + 1, c.num_items))
    x[users_of(train), train.items] = 1
    inverse = np.linalg.inv(x.T @ x + c.regularisation * np.eye(c.num_items))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    history, target = test.histories_and_targets(c.history_length)
    queries = np.zeros((len(test), c.num_items + 1))
    np.put_along_axis(queries, history, 1, axis=1)  # padding, -1, fills the last column
    logits = torch.from_numpy(
        np.concatenate([np.zeros((len(test), 1)), queries[:, :-1] @ weights], 1)
    )
    return _gain(logits, torch.from_numpy(target).long() + 1) / len(test)
