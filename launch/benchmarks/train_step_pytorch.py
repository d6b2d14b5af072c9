"""PyTorch's side of train_step.py: the step as most people would write it, and two faster ones.

All attend with torch's fused scaled_dot_product_attention. Padding is on the right, where causal
attention needs no mask; the plain step gives one, as most people do.

Axis letters: B batch, S sequence, T target tokens, I items, V vocabulary.
"""

import os
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from measuring import cf_distributions_loop, prefixes, pytorch_device
from train_step_inputs import (
    ALPHA,
    BETA,
    OPTIMIZER,
    TAU,
    Inputs,
)

from tca4rec_jax.training.optimizer import make_schedule


def pytorch(inputs: Inputs):
    """step number -> loss, for every PyTorch contestant.

    Of the compiled one each layer (adapters included) is compiled, forward and backward; the
    embedding, last norm, head, loss and optimiser run as they are. Its rows are padded to a fixed
    length, so that all compilation is in the first step.
    """
    case = inputs.case
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_default_device(pytorch_device())
    folder = Path(case.exported)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base", dtype=getattr(torch, case.dtype), attn_implementation="sdpa"
    )
    model.config.use_cache = False
    model = peft.PeftModel.from_pretrained(model, folder / "adapters", is_trainable=True)
    model.to(pytorch_device()).train()
    plain, compiled = (case.contestant.startswith(f"PyTorch, {n}") for n in ("plain", "compiled"))
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # no layer is left uncompiled
        for layer in model.base_model.model.model.layers:
            layer.compile(dynamic=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=OPTIMIZER.weight_decay)
    schedule = make_schedule(OPTIMIZER, case.steps)
    batches, titles = inputs.batches, inputs.items.written
    examples = batches.examples
    targets = inputs.data.splits["train"].items[examples.cf_position.values]
    rows = np.concatenate([inputs.rows(number) for number in range(case.steps)])
    tries = prefixes(titles, targets[rows]) if plain else {}
    below = {prefix: tuple(map(torch.tensor, lists)) for prefix, lists in tries.items()}

    def loss_of(rows):
        length_B = examples.tokens.lengths[rows]
        longest = inputs.columns if compiled else int(length_B.max())
        tokens_BxS = torch.tensor(examples.tokens.pad(rows, longest, 0)).long()
        row = torch.tensor(np.repeat(np.arange(rows.size), examples.position.lengths[rows]))
        position = torch.tensor(examples.position.take(rows).values).long()
        label = torch.tensor(examples.label.take(rows).values).long()
        if not plain:
            body = model.base_model.model
            hidden_BxSxD = body.model(tokens_BxS)[0]
            logits_TxV = body.lm_head(hidden_BxSxD[row, position])
            return torch.nn.functional.cross_entropy(logits_TxV.float(), label)
        mask_BxS = torch.arange(longest)[None, :] < torch.tensor(length_B)[:, None]
        logits_BxSxV = model(tokens_BxS, attention_mask=mask_BxS).logits.float()
        of_row = [titles[item].tolist() for item in targets[rows]]
        starts = [int(examples.position[r][0]) for r in rows]
        vectors = batches.store.read(examples.cf_position.take(rows).values)
        cf_BxI = torch.tensor(vectors @ batches.store.item_table.T)
        cf_BxSxV = cf_distributions_loop(below, of_row, starts, cf_BxI, BETA, logits_BxSxV)
        weight_BxS = torch.zeros(tokens_BxS.shape)
        weight_BxS[row, position] = 1.0
        label_BxS = torch.zeros_like(tokens_BxS)
        label_BxS[row, position] = label
        # Elsewhere than at the target everything is allowed, so that no softmax is empty.
        allowed_BxSxV = (cf_BxSxV > 0) | (weight_BxS == 0)[:, :, None]
        p_BxSxV = torch.softmax((logits_BxSxV / TAU).masked_fill(~allowed_BxSxV, -1e30), dim=-1)
        onehot_BxSxV = torch.nn.functional.one_hot(label_BxS, logits_BxSxV.shape[2]).float()
        y_BxSxV = (1 - ALPHA) * onehot_BxSxV + ALPHA * cf_BxSxV
        loss_BxS = -torch.log((y_BxSxV * p_BxSxV).sum(dim=-1))
        return (loss_BxS * weight_BxS).sum() / weight_BxS.sum()

    def step(number: int) -> float:
        optimizer.param_groups[0]["lr"] = float(schedule(number))
        loss = loss_of(inputs.rows(number))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, OPTIMIZER.clip)
        optimizer.step()
        return float(loss.detach())

    return step
