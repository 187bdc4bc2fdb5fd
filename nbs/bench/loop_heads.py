"""Training of PPI heads by the loop of loops.py: an encoder's tokens lie on the device, and so do all scores."""

import time

import torch
import torch.nn.functional as F
from lanes import WAIT
from loops import GraphedRun, epoch_orders

from protmae.models.v2 import TransformerMAE
from protmae.models.v5 import real_patches
from protmae.ppi.metrics import auprc, auroc
from protmae.ppi.training import make_classifier


def moment_sums(x, real) -> tuple:
    "Number, sum and products of the real rows of (n, E)."
    x = x.double() * real[:, None]
    return real.sum(), x.sum(0), x.T @ x


@torch.no_grad()
def fit_whitening(whitening, sums, shrink):
    "`Whitening.fit` from sums; the decomposition on the CPU, where it holds up no other lane."
    count, total, products = sums
    count = count.item()
    mean = total.cpu() / count
    values, vectors = torch.linalg.eigh(products.cpu() / count - torch.outer(mean, mean))
    values = values.clamp(min=0)
    whitening.mean.copy_(mean)
    whitening.map.copy_(vectors / (values + shrink * values.mean().clamp(min=1e-12)).sqrt())


def best_of(values, patience) -> int:
    "Where a run with this patience has its highest value."
    best = stale = 0
    for epoch, value in enumerate(values):
        if value > values[best] or epoch == 0:
            best, stale = epoch, 0
        else:
            stale += 1
        if patience and stale >= patience:
            break
    return best


class HeadLoop(GraphedRun):
    "One PPI head on an encoder; with `lora` additions to the encoder train as well."

    kind, most, rank = "ppi", 2, 1

    def __init__(
        self,
        name,
        data,  # `Data`
        pairs,  # `Pairs`
        split,  # `Split`
        config,  # `PPIConfig`
        make_encoder,  # without arguments
        train_proteins,  # positions: the whitening is fitted on them
        device,
        lora=False,
        graphs=True,
        after=None,  # a CUDA event that must have happened before it begins
        keep_head=False,  # the last weights of the head stay
        about=None,  # dict: more for the result
    ):
        super().__init__(name, config, device, graphs, priority=0 if lora else -2)
        self.data, self.pairs, self.split, self.lora = data, pairs, split, lora
        self.make_encoder, self.train_proteins, self.after = make_encoder, train_proteins, after
        self.keep_head, self.about, self.result = keep_head, about or {}, None

    @torch.no_grad()
    def tokens(self, net):
        "What the encoder says of every protein, float16, (N, T, E)."
        data, is_v2, was_training, parts = self.data, isinstance(net.encoder, TransformerMAE), net.training, []
        in_bf16 = self.lora and self.is_gpu
        net.eval()
        torch.backends.cuda.matmul.allow_tf32 = True
        for index, width in data.sorted_batches(64 if is_v2 else 512):
            batch = data.batch("v2" if is_v2 else "v5", index, width)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=in_bf16):
                encoded = net.encode(batch.get("x"), batch["lengths"], batch.get("patches"))
            parts.append((index, encoded.half()))
        torch.backends.cuda.matmul.allow_tf32 = False
        shape = parts[0][1].shape[1:]
        table = torch.zeros(len(data.lengths), *shape, dtype=torch.float16, device=self.device)
        for index, encoded in parts:
            table[index] = encoded
        net.train(was_training)
        return table

    def real_tokens(self, net):
        "(N, T) bool"
        real = real_patches(self.data.lengths, net.patching)
        return real if net.white_cls is None else F.pad(real, (1, 0), value=True)

    @torch.no_grad()
    def whitened(self, net, table):
        "Features of all proteins, float16."
        out, real = torch.empty_like(table), self.real_tokens(net)[..., None]
        for i in range(0, len(table), 1024):
            part = slice(i, i + 1024)
            out[part] = net.whiten(table[part].float()) * real[part]
        return out

    def prepare(self):
        "All that comes before the first step, waiting for it."
        self.begin()
        if self.is_gpu:
            torch.cuda.current_stream().synchronize()
        self.whiten()

    def begin(self):
        "Orders and labels to the device, tokens of all proteins, and the sums that whitening is fitted from."
        config, device, pairs = self.config, self.device, self.pairs
        self.net = net = make_classifier(self.make_encoder(), config).to(device)
        self.a, self.b = (torch.tensor(end).to(device) for end in (pairs.a, pairs.b))
        self.label = torch.tensor(pairs.label).float().to(device)
        orders = epoch_orders(self.split.train, config)
        self.sizes = [[len(batch) for batch in order] for order in orders]
        self.plan_steps(net, orders)
        self.asked = {part: torch.as_tensor(getattr(self.split, part)).to(device) for part in ("val", "test")}
        self.scores = {part: torch.zeros(config.epochs, len(v), device=device) for part, v in self.asked.items()}
        self.raw = self.tokens(net)
        train = torch.as_tensor(self.train_proteins).to(device)
        tokens, real = self.raw[train], self.real_tokens(net)[train]
        cls = int(net.white_cls is not None)
        self.sums = [moment_sums(tokens[:, cls:].flatten(0, 1), real[:, cls:].flatten())]
        if cls:
            self.sums.append(moment_sums(tokens[:, 0], real[:, 0]))

    def whiten(self):
        "Fit the whitening; whiten the tokens, where the encoder does not change them any more."
        whitenings = [self.net.white_patch, self.net.white_cls][: len(self.sums)]
        for whitening, sums in zip(whitenings, self.sums, strict=True):
            fit_whitening(whitening, sums, self.config.whiten)
        self.table = None if self.lora else self.whitened(self.net, self.raw)
        self.raw = self.sums = None
        self.net.train()

    def logits(self, pairs, table):
        "(n,) pairs by position -> (n,) logits; `table` None: through the encoder."
        index = torch.cat([self.a[pairs], self.b[pairs]])
        lengths, first = self.data.lengths[index], torch.arange(len(pairs), device=self.device)
        with self.autocast():
            if table is None:
                features = self.net.features(None, lengths, self.data.patches[index])
            else:
                features = table[index].float()
            return self.net.score(features, lengths, first, first + len(pairs)).float()

    def step(self, size):
        self.forget_gradients(self.net)
        pairs, _ = self.next_batch(size)
        loss = F.binary_cross_entropy_with_logits(self.logits(pairs, self.table), self.label[pairs])
        self.update(loss, torch.full((), size, device=self.device))

    @torch.no_grad()
    def score(self, epoch):
        "Probabilities of validation and test pairs, left on the device."
        self.net.eval()
        table = self.table if self.table is not None else self.whitened(self.net, self.tokens(self.net))
        for part, pairs in self.asked.items():
            for i in range(0, len(pairs), 1024):
                self.scores[part][epoch, i : i + 1024] = self.logits(pairs[i : i + 1024], table).sigmoid()
        self.net.train()

    def run(self):
        "All epochs; yields after each step."
        began = time.perf_counter()
        while self.after is not None and not self.after.query():
            yield WAIT
        self.begin()
        yield
        yield from self.wait_until_idle()
        self.whiten()
        yield
        for epoch, sizes in enumerate(self.sizes):
            for size in sizes:
                self.enqueue(size)
                yield
            self.score(epoch)
            yield
        yield from self.wait_until_idle()
        self.finish(time.perf_counter() - began)

    def finish(self, seconds):
        "Choose the epoch on validation pairs, make the result, and give the memory back."
        label = {part: self.pairs.label[getattr(self.split, part)].astype(int) for part in ("val", "test")}
        scores = {part: values.cpu().numpy() for part, values in self.scores.items()}
        val_auroc = [auroc(label["val"], values) for values in scores["val"]]
        best, losses = best_of(val_auroc, self.config.patience), self.losses.cpu()
        val, test = scores["val"][best], scores["test"][best]
        self.result = self.about | dict(
            name=self.name,
            split=self.split.kind,
            seed=self.split.seed,
            best_epoch=best + 1,
            val_auroc_by_epoch=val_auroc,
            train_loss_by_epoch=[self.mean_loss(self.losses_of(losses, e)) for e in range(self.config.epochs)],
            val_auroc=val_auroc[best],
            test_auroc=auroc(label["test"], test),
            test_auprc=auprc(label["test"], test),
            seconds=seconds,
            pairs_per_epoch=self.n,
            finite=bool(torch.isfinite(losses).all()),
            epochs=self.config.epochs,
        )
        self.kept_scores = dict(val=val.astype("f4"), test=test.astype("f4"))
        self.word = f"val {val_auroc[best]:.4f}  test {self.result['test_auroc']:.4f}  (epoch {best + 1})"
        self.head = None
        if self.keep_head:
            state = self.net.state_dict()
            self.head = {name: value.cpu() for name, value in state.items() if not name.startswith("encoder.")}
        for name in ("net", "table", "optimizer", "parameters", "scores", "graphs", "asked", "order", "make_encoder"):
            setattr(self, name, None)
