"""Holds checkpoints against the rest of the world: Python's safetensors reads both files, and the same model in
PyTorch (float64, automatic differentiation, figure 2 of arXiv 2410.02703 as printed) finds the same gradient.

    interchange.py RUN BATCH.json

RUN was trained with train.clip 0 and holds step 0 and step 1; BATCH.json is `selectra data batch CONFIG --step 1 --json`.
After one step from zero moments exp_avg / (1 - beta1) is the gradient and exp_avg_sq / (1 - beta2) its square.
Needs torch, safetensors, numpy; exit status 77 where they are missing.
"""
import json
import sys

try:
    import torch
    from safetensors.torch import load_file
except ImportError as e:
    print(f"skipped: {e}")
    sys.exit(77)


def rms(x, w):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * w


def attention(q, k, v, selective, selecting):
    """selecting: sel_q and sel_k [b, n, dh], or None: head 0 selects."""
    n, dh = q.shape[-2], q.shape[-1]
    logits = q @ k.transpose(-1, -2) / dh**0.5
    logits = logits.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), float("-inf"))
    if selective:
        s = logits[:, 0] if selecting is None else (selecting[0] @ selecting[1].transpose(-1, -2) / dh**0.5).tril()
        s = torch.relu(s)
        s = s * (1 - torch.eye(n, dtype=s.dtype))
        s = torch.cat([torch.zeros_like(s[..., :1]), s[..., 1:]], -1)
        s = torch.cat([torch.zeros_like(s[:, :1]), s[:, :-1]], 1)
        f = torch.cumsum(s, -2)
        logits = logits - f[:, None]
    else:
        f = None
    return torch.softmax(logits, -1) @ v, f


def loss_of(p, c, tokens):
    heads, kv, dh = c["model"]["heads"], c["model"]["kv_heads"], c["model"]["head_width"]
    layers, selective = c["model"]["layers"], c["attention"]["kind"] == "selective"
    epsilon, tau = c["attention"]["memory_loss"]["epsilon"], c["attention"]["memory_loss"]["tau"]
    x, y = tokens[:, :-1], tokens[:, 1:]
    b, n = x.shape
    h = p["tok_embed.weight"][x] + p["pos_embed.weight"][:n]
    memory = 0.0
    for l in range(layers):
        g = lambda name: p[f"layers.{l}.{name}.weight"]
        a = rms(h, g("attn_norm"))
        split = lambda name, m: (a @ g(name).T).view(b, n, m, dh).transpose(1, 2)
        q, k, v = split("attn.q_proj", heads), split("attn.k_proj", kv), split("attn.v_proj", kv)
        q, k = rms(q, g("attn.q_norm")), rms(k, g("attn.k_norm"))
        k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
        bilinear = c["attention"]["selection"]["source"] == "bilinear"
        selecting = (a @ g("attn.sel_q").T, a @ g("attn.sel_k").T) if bilinear else None
        out, f = attention(q, k, v, selective, selecting)
        h = h + out.transpose(1, 2).reshape(b, n, heads * dh) @ g("attn.o_proj").T
        a = rms(h, g("ffn_norm"))
        h = h + (torch.nn.functional.silu(a @ g("ffn.gate_proj").T) * (a @ g("ffn.up_proj").T)) @ g("ffn.down_proj").T
        if epsilon:
            i = torch.arange(n)
            m = (i + 1) - (torch.clamp(f, max=tau).tril() / tau).sum(-1)
            memory = memory + m.max(-1).values
    logits = rms(h, p["final_norm.weight"]) @ p["lm_head.weight"].T
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    return loss + (epsilon * (memory / (layers * n)).mean() if epsilon else 0.0), loss


def main():
    run, batch = sys.argv[1:]
    first, second = (f"{run}/checkpoints/step-{s:08d}" for s in (0, 1))
    manifest = json.load(open(f"{second}/manifest.json"))
    config = {}
    section = []
    for line in manifest["config"].splitlines():          # the resolved YAML: plain nested mappings
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        depth, (key, _, value) = (len(line) - len(line.lstrip())) // 2, line.strip().partition(":")
        section = section[:depth] + [key]
        node = config
        for s in section[:-1]:
            node = node.setdefault(s, {})
        value = value.strip().strip('"')
        if value:
            try:
                node[key] = int(value)
            except ValueError:
                try:
                    node[key] = float(value)
                except ValueError:
                    node[key] = value

    tokens = torch.tensor(json.load(open(batch))["tokens"])
    params = {k: v.double().requires_grad_() for k, v in load_file(f"{first}/model.safetensors").items()}
    total, loss = loss_of(params, config, tokens)
    total.backward()

    state = load_file(f"{second}/optimizer.safetensors")
    assert sorted(state) == sorted([f"exp_avg.{k}" for k in params] + [f"exp_avg_sq.{k}" for k in params]), "names"
    row = next(r for r in map(json.loads, open(f"{run}/metrics.jsonl")) if r["step"] == 1)
    assert abs(row["loss"] - loss.item()) < 1e-6 * loss.item(), (row["loss"], loss.item())

    beta1, beta2 = config["train"]["beta1"], config["train"]["beta2"]
    whole = torch.sqrt(sum((p.grad**2).sum() for p in params.values()))
    error, worst = 0.0, (0.0, "")
    for name, p in params.items():
        got = state[f"exp_avg.{name}"].double() / (1 - beta1)
        d = (got - p.grad).norm()
        error += d**2
        worst = max(worst, ((d / p.grad.norm()).item(), name))
        square = state[f"exp_avg_sq.{name}"].double() / (1 - beta2)
        assert torch.allclose(square, got**2, rtol=1e-4, atol=1e-20), name
    error = (error**0.5 / whole).item()
    print(f"loss {loss.item():.6f}; gradient differs by {error:.2e} of its norm, at most {worst[0]:.2e} of a tensor's "
          f"({worst[1]}); norm {whole.item():.6f}, logged {row['grad_norm']:.6f}")
    assert error < 1e-5 and worst[0] < 1e-4
    assert abs(whole.item() - row["grad_norm"]) < 1e-5 * whole.item()


main()
