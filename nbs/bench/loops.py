"""Training loops for a card: every shape of a step is one CUDA graph.

Models, masks, losses, orders, schedules and seeds are the library's. Only the loop is written here. A shape is met
three times: first it runs as it is, then it is captured, from then on it is replayed. Nothing within a step asks the
device anything: the batch, the mask's key and the learning rate follow from a counter that lies on the device. On a
CPU the same code runs without graphs, which is how loops_check.py holds it against the library's trainers.
"""

import functools
import math
import time
from contextlib import nullcontext

import numpy as np
import torch
from lanes import WAIT, Lane, capture

from protmae.core import MAX_LEN, N_PATCHES, seed_for
from protmae.data.batches import EpochSampler
from protmae.models.hub import build
from protmae.training.config import make_config
from protmae.training.objectives import V2Objective, V5Objective
from protmae.training.optim import Schedule, optimizer_for
from protmae.training.skill import Skill


@functools.cache
def reading_stream(device):
    return torch.cuda.Stream(device)


def read(tensor):
    "A tensor's numbers, without waiting for steps that are still to come."
    if not tensor.is_cuda:
        return tensor.clone()
    with torch.cuda.stream(reading_stream(tensor.device)):
        return tensor.cpu()


def padded_width(longest) -> int:
    "A multiple of 64, so that there are few shapes."
    return min(-(-int(longest) // 64) * 64, MAX_LEN)


class Data:
    "What runs read: standardised patches of every protein, or float16 residues with their mean and deviation."

    def __init__(
        self, lengths, dim, device, train_idx=None, val_idx=None, patches=None, table=None, mean=None, std=None
    ):
        self.host_lengths, self.dim, self.device = np.asarray(lengths), dim, device
        starts = np.concatenate([[0], np.cumsum(self.host_lengths)[:-1]])
        self.lengths, self.starts = (torch.as_tensor(v).to(device) for v in (self.host_lengths, starts))
        self.train_idx, self.val_idx = train_idx, val_idx
        self.patches, self.table, self.mean, self.std = patches, table, mean, std

    def residues(self, index, width):
        "(B,) proteins -> (B, width, D) standardised residues, zero-padded."
        place = torch.arange(width, device=self.device)
        rows = self.starts.index_select(0, index)[:, None] + place
        x = self.table[rows.clamp(max=len(self.table) - 1)]
        real = place < self.lengths.index_select(0, index)[:, None]
        return torch.where(real[..., None], (x.float() - self.mean) / self.std, 0)

    def batch(self, arch, index, width) -> dict:
        "What the library's objectives read."
        inputs = dict(lengths=self.lengths.index_select(0, index), index=index)
        if arch == "v5":
            return inputs | dict(patches=self.patches.index_select(0, index))
        return inputs | dict(x=self.residues(index, width))

    def sorted_batches(self, size):
        "All proteins, longest first: positions and width."
        order = np.argsort(-self.host_lengths, kind="stable")
        for begin in range(0, len(order), size):
            batch = order[begin : begin + size]
            yield torch.as_tensor(batch).to(self.device), padded_width(self.host_lengths[batch].max())


def epoch_orders(indices, config, lengths=None) -> list:  # of lists of arrays
    "The batches of every epoch, as the library's trainers draw them."
    sampler, orders = EpochSampler(indices, config.batch_size, lengths, config.seed), []
    for epoch in range(config.epochs):
        sampler.set_epoch(epoch)
        orders.append([np.asarray(batch) for batch in sampler])
    return orders


def linear_weights(model) -> list:
    "Weights and biases of all linear maps: what autocast would make bf16 at every step."
    found = []
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            found += [module.weight, module.bias]
        elif isinstance(module, torch.nn.MultiheadAttention):
            found += [module.in_proj_weight, module.in_proj_bias]
    return [parameter for parameter in found if parameter is not None and parameter.requires_grad]


class GraphedRun:
    "What all runs share: shapes that become graphs, and a counter on the device. A subclass has `step` and `run`."

    kind, most, rank, needs, word = "run", 99, 0, (), ""

    def __init__(self, name, config, device, graphs=True, depth=48, priority=0):
        self.name, self.config, self.device, self.is_gpu = name, config, device, device.type == "cuda"
        self.lane = Lane(device, depth, priority)
        self.graphs = {} if graphs and self.is_gpu else None
        self.seen = set()
        self.pool = torch.cuda.graph_pool_handle() if self.graphs is not None else None

    def autocast(self):
        return torch.autocast("cuda", torch.bfloat16) if self.is_gpu else nullcontext()

    def enqueue(self, *shape):
        "One step of this shape."
        if self.graphs is None or shape not in self.seen:
            self.seen.add(shape)
            self.step(*shape)
            return
        if shape not in self.graphs:
            self.graphs[shape] = capture(functools.partial(self.step, *shape), self.pool)
        self.graphs[shape]()

    def plan_steps(self, model, orders):
        "Optimiser, learning rates of all steps, the order of all epochs."
        config, device = self.config, self.device
        self.n, self.steps_per_epoch = sum(map(len, orders[0])), len(orders[0])
        total = self.steps_per_epoch * config.epochs
        self.optimizer = optimizer_for(model, config.lr, config.weight_decay)
        self.bf16_weights, self.masters, self.master_of = [], [], {}
        schedule = Schedule(self.steps_per_epoch, config.epochs, config.warmup_epochs)
        self.rates = torch.tensor([config.lr * schedule(step) for step in range(total)], dtype=torch.float64)
        if self.is_gpu:
            self.rates = self.rates.float().to(device)
            self.rate = torch.zeros((), device=device)
            for group in self.optimizer.param_groups:
                group["lr"], group["capturable"] = self.rate, True
        self.order = torch.as_tensor(np.concatenate([np.concatenate(order) for order in orders])).to(device)
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.losses = torch.zeros(total, 3, dtype=torch.float64, device=device)  # loss, gradient norm, count
        self.list_parameters()

    def list_parameters(self):
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def use_bf16_weights(self, model):
        """bf16 copies of the weights of linear maps take part in the step; the optimiser keeps them in float32.

        Autocast gives the same numbers, but casts each weight and each gradient by a kernel of its own.
        """
        self.bf16_weights = linear_weights(model)
        self.masters = [torch.nn.Parameter(p.detach().clone()) for p in self.bf16_weights]
        pairs = list(zip(self.bf16_weights, self.masters, strict=True))
        self.master_of = {id(weight): master for weight, master in pairs}
        for group in self.optimizer.param_groups:
            group["params"] = [self.master_of.get(id(p), p) for p in group["params"]]
        for weight, master in pairs:
            weight.data = weight.data.bfloat16()
            master.grad = torch.zeros_like(master)
        self.list_parameters()

    def forget_gradients(self, model):
        for parameter in model.parameters():
            parameter.grad = None

    def next_batch(self, size) -> tuple:
        "The next positions, and the epoch they are of."
        epoch, step = self.counter // self.steps_per_epoch, self.counter % self.steps_per_epoch
        first = epoch * self.n + step * self.config.batch_size
        return self.order.index_select(0, first + torch.arange(size, device=self.device)), epoch

    def set_rate(self):
        "The learning rate of this step."
        if self.is_gpu:
            self.rate.copy_(self.rates.index_select(0, self.counter)[0])
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[self.counter.item()].item()

    def update(self, loss, count):
        "Backward, clip, step, and a line of the log."
        self.set_rate()
        loss.backward()
        if self.bf16_weights:
            torch._foreach_copy_([p.grad for p in self.masters], [p.grad for p in self.bf16_weights])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        if self.bf16_weights:
            with torch.no_grad():
                torch._foreach_copy_(self.bf16_weights, self.masters)
        row = torch.stack([value.detach().double() for value in (loss, norm, count)])
        self.losses.index_copy_(0, self.counter, row[None])
        self.counter += 1

    def losses_of(self, losses, epoch):
        "Rows of the log of one epoch."
        return losses[epoch * self.steps_per_epoch : (epoch + 1) * self.steps_per_epoch]

    def mean_loss(self, rows) -> float:
        "Mean over all values, not over batches."
        return float((rows[:, 0] * rows[:, 2]).sum() / rows[:, 2].sum())

    def wait_until_idle(self):
        while not self.lane.is_idle():
            yield WAIT


class LoopV5Objective(V5Objective):
    "The library's objective, without data of its own."

    def __init__(self):
        self.patching = "window"


class LoopV2Objective(V2Objective):
    "The library's objective, without data of its own."

    def __init__(self):
        pass


class PretrainLoop(GraphedRun):
    "One pretraining run. Validated after every epoch; encoders are kept as they were after some of them."

    kind = "pretrain"

    def __init__(
        self,
        name,
        arch,  # 'v2' or 'v5'
        data,  # `Data` with train_idx and val_idx
        device,
        sizes=None,  # of the model
        keep=(),  # epochs after which the encoder is kept, and 'best'
        on_keep=None,  # called with the run and one of `keep`
        model=None,  # with its first weights; None: a new one
        graphs=True,
        depth=48,
        priority=0,
        bf16_weights=None,  # None: on a GPU
        **changes,  # of the config
    ):
        config = make_config(arch, **changes)
        super().__init__(name, config, device, graphs, depth, priority)
        self.arch, self.data, self.keep, self.on_keep = arch, data, set(keep), on_keep
        self.objective = LoopV5Objective() if arch == "v5" else LoopV2Objective()
        self.sizes = dict(input_dim=data.dim) | (sizes or {})
        if model is None:
            torch.manual_seed(seed_for(config.seed, "weights"))
            model = build(arch, **self.sizes)
        self.model = model.to(device).train()
        orders = epoch_orders(data.train_idx, config, data.host_lengths if arch == "v2" else None)
        self.shapes = [[self.shape_of(batch) for batch in order] for order in orders]
        self.plan_steps(self.model, orders)
        if self.is_gpu if bf16_weights is None else bf16_weights:
            self.use_bf16_weights(self.model)
        keys = [seed_for(config.seed, "mask", epoch) for epoch in range(config.epochs)]
        self.keys = torch.tensor(keys, device=device)
        self.plan_validation()

    def plan_validation(self):
        "Batches, and room for the figures of all epochs: five sums of the skill, of losses, of values."
        self.validations = torch.zeros(self.config.epochs, 7, dtype=torch.float64, device=self.device)
        self.best = torch.full((), math.inf, dtype=torch.float64, device=self.device)
        self.kept, self.ended = {}, []
        size = 512 if self.arch == "v5" else self.config.batch_size
        batches = EpochSampler(self.data.val_idx, size, self.data.host_lengths, shuffle=False)
        batches = [np.asarray(batch) for batch in batches]
        self.val_batches = [(torch.as_tensor(batch).to(self.device), self.shape_of(batch)[1]) for batch in batches]

    def shape_of(self, batch) -> tuple:
        "What decides the shapes of a batch: how many proteins, how wide."
        return len(batch), N_PATCHES if self.arch == "v5" else padded_width(self.data.host_lengths[batch].max())

    def forward(self, *inputs, **more) -> tuple:
        "What the model makes of a batch: computed in bf16 on a GPU, given in float32."
        with self.autocast():
            outputs = self.model(*inputs, **more)
        return tuple(value.float() if value.is_floating_point() else value for value in outputs)

    def loss(self, index, key, width) -> tuple:
        "Loss, how many values it is a mean of, and the `Reconstruction`."
        batch = self.data.batch(self.arch, index, width)
        terms, reconstruction = self.objective.loss(self.forward, batch, self.config, key)
        return sum(mean for mean, _ in terms), terms[0][1], reconstruction

    def step(self, size, width):
        self.forget_gradients(self.model)
        index, epoch = self.next_batch(size)
        loss, count, _ = self.loss(index, self.keys.index_select(0, epoch), width)
        self.update(loss, count)

    @torch.no_grad()
    def validate(self, epoch):
        "Sums over the validation proteins, left on the device."
        key, skill = seed_for(self.config.seed, "validate"), Skill()
        skill.sums, sums = (torch.zeros(n, dtype=torch.float64, device=self.device) for n in (5, 2))
        self.model.eval()
        for index, width in self.val_batches:
            loss, count, reconstruction = self.loss(index, key, width)
            skill.add(*reconstruction)
            sums += torch.stack([loss.double() * count, count.double()])
        self.model.train()
        self.validations[epoch] = torch.cat([skill.sums, sums])
        loss = sums[0] / sums[1]
        better = loss < self.best
        self.best = torch.where(better, loss, self.best)
        if "best" in self.keep:
            self.keep_if(better)

    def keep_if(self, better):
        "Remember the encoder as the best one, where `better` (a tensor) is true."
        now = self.state(self.encoder())
        if "best" not in self.kept:
            self.kept["best"] = {name: value.clone() for name, value in now.items()}
        for name, value in self.kept["best"].items():
            value.copy_(torch.where(better, now[name], value))

    def encoder(self):
        return self.model.encoder if self.arch == "v5" else self.model

    def state(self, module) -> dict:
        "Its weights in float32."
        state = module.state_dict(keep_vars=True)
        return {name: self.master_of.get(id(value), value).detach() for name, value in state.items()}

    def keep_now(self, which):
        "Keep the encoder as it is, and say so."
        if which not in self.kept:
            self.kept[which] = {name: value.clone() for name, value in self.state(self.encoder()).items()}
        if self.on_keep:
            self.on_keep(self, which)

    def run(self):
        "All epochs; yields after each step."
        if self.lane.stream:
            self.lane.stream.wait_stream(torch.cuda.default_stream(self.device))
        if 0 in self.keep:
            self.keep_now(0)
        yield
        for epoch, shapes in enumerate(self.shapes):
            for shape in shapes:
                self.enqueue(*shape)
                yield
            self.validate(epoch)
            self.ended.append(self.time_stamp())
            if epoch + 1 in self.keep:
                self.keep_now(epoch + 1)
            yield
        yield from self.wait_until_idle()
        if "best" in self.keep:
            self.keep_now("best")
        row = self.log()[-1]
        self.word = f"val {row['val_loss']:.4f} skill {row['skill']:+.3f} (mean {row['skill_mean']:+.3f})"

    def time_stamp(self):
        "Now, on the lane."
        if self.lane.stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.lane.stream)
        return event

    def epochs_ended(self) -> int:
        return sum(isinstance(stamp, float) or stamp.query() for stamp in self.ended)

    def log(self) -> list:
        "A row per epoch that has ended."
        n = self.epochs_ended()
        losses, validations = read(self.losses), read(self.validations).tolist()
        return [self.log_row(epoch, self.losses_of(losses, epoch), validations[epoch]) for epoch in range(n)]

    def log_row(self, epoch, losses, sums) -> dict:
        "The figures of one epoch."
        model, *baselines, values, loss, count = sums
        skill, skill_mean, skill_visible = (1 - model / b if b > 0 else 0.0 for b in baselines)
        row = dict(
            epoch=epoch + 1,
            train_loss=self.mean_loss(losses),
            val_loss=loss / count,
            mse=model / values,
            skill=skill,
            skill_mean=skill_mean,
            skill_visible=skill_visible,
            grad_norm=float(losses[:, 1].mean()),
            finite=bool(torch.isfinite(losses).all()),
        )
        if epoch and not isinstance(self.ended[epoch], float):
            row["seconds"] = self.ended[epoch - 1].elapsed_time(self.ended[epoch]) / 1e3
        return row
