"""The loss of a batch from the decoder's logits by plain loops over titles, tokens and items."""

import numpy as np


def loss(experiment, batches, number, logits_BxSxV):
    """(sum, denominator) of batch `number`, float64; the objective is that of the config."""
    objective, examples = experiment.config.objective, batches.examples
    written = [experiment.items.written[i].tolist() for i in range(len(experiment.items.written))]
    split = experiment.data.splits[
        "train_sequences" if experiment.config.training.targets == "all" else "train"
    ]
    total, count = 0.0, 0
    for row, example in enumerate(batches.rows(number)):
        position = iter(examples.position[example].tolist())
        if not examples.cf_position[example].size:  # a task's answer
            for at, label in zip(position, examples.label[example], strict=True):
                logits_V = np.asarray(logits_BxSxV[row, at], np.float64)
                total += position_loss(logits_V / objective.tau, label, {label: 1.0}, objective)
                count += 1
        for cf_position in examples.cf_position[example]:
            target = (
                examples.label[example].tolist()
                if experiment.config.recommender.name == "answer"
                else written[split.items[cf_position]]
            )
            p_cf_I = item_distribution(batches.store, cf_position, objective.beta)
            for at in range(len(target)):
                logits_V = np.asarray(logits_BxSxV[row, next(position)], np.float64)
                p_cf = next_tokens(written, target[:at], p_cf_I)
                one = position_loss(logits_V / objective.tau, target[at], p_cf, objective)
                total += one * (objective.tau if objective.scale_by_tau else 1.0)
                count += objective.mean_over == "positions" or len(p_cf) > 1
        assert next(position, None) is None
    return total, count


def item_distribution(store, cf_position, beta):
    """p_cf of all items."""
    cf = np.asarray(store.read(np.array([cf_position])), np.float64)[0]
    items = store.cf_items
    if items.table_IxD is not None:
        cf = np.asarray(items.table_IxD, np.float64) @ cf
    if items.bias_I is not None:
        cf = cf + items.bias_I
    p = np.exp((cf - cf.max()) / beta)
    return p / p.sum()


def next_tokens(written, prefix, p_I):
    """{next token: its probability} of the items that begin with a prefix."""
    found = {}
    for tokens, p in zip(written, p_I, strict=True):
        if tokens[: len(prefix)] == prefix:
            token = tokens[len(prefix)]
            found[token] = found.get(token, 0.0) + p
    return {token: p / sum(found.values()) for token, p in found.items()}


def position_loss(z_V, label, p_cf, objective):
    """-log sum_v y(v) P(v), or -sum_v y(v) log P(v), of the soft labels y."""
    legal = sorted(p_cf) if objective.softmax == "children" else range(z_V.size)
    normaliser = np.logaddexp.reduce(z_V[list(legal)])
    alpha = objective.alpha
    y = {token: alpha * p + (1 - alpha) * (token == label) for token, p in p_cf.items()}
    log_p = {token: z_V[token] - normaliser for token in y}
    if objective.form == "cross_entropy":
        return -sum(y[token] * log_p[token] for token in y)
    return -np.log(sum(y[token] * np.exp(log_p[token]) for token in y))
