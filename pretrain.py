"""Pre-train a ResNet with SimCLR on the slices that a selection keeps.

    python pretrain.py OUT/hash-6.csv RUN --epochs 100    # RUN/encoder.pt and log.jsonl
    python pretrain.py OUT/hash-6.csv RUN --steps-of RUN2    # as many steps as another run
    python pretrain.py OUT/hash-6.csv RUN --hold-out 0.1    # and the log has the loss of other CT
    torchrun --nproc-per-node 8 pretrain.py OUT/hash-6.csv RUN    # 8 GPUs share a batch

Without flags it is the paper's 800 epochs of a ResNet-50 with LARS, for a GPU; on a CPU give --arch
resnet18 --optimizer adamw. Called again on an unfinished RUN, which holds checkpoint.pt, it goes on
where it was, to the same bytes; on a finished one it says so and does nothing. A RUN of other
settings, or of edited code, is refused.
"""

import io
import json
import math
import sys
import time
from contextlib import nullcontext
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from common import batches, files, simclr
from common.batches import epoch_batches, epoch_size
from common.encoder import ARCHS, SMALLEST, choose_device, choose_precision, to_input
from common.files import fail, number
from common.store import read_selection

METRICS = ("loss", "top1", "std", "positive")  # of a step; positive: cosine of a slice's two views
SAVE_EVERY = 60  # seconds between checkpoints: what a killed run loses at most
LOG_EVERY = 5  # seconds between writings of the log, which is written whole
LOOK_EVERY = 10  # steps between looks at the loss: a GPU would stand still at every step


def main():
    args = parse_args()
    device = choose_device(args.device)
    rank, world = join_processes(device)
    selection = read_selection(args.selection)
    selection, held_out = batches.hold_out(selection, args.hold_out, args.seed)
    header = describe(args, selection, device, world, held_out)
    with files.exclusive(args.run) if rank == 0 else nullcontext():
        saved = open_run(args.run, header, rank, device)
        train(args, selection, held_out, header, saved, device, rank, world)
    if dist.is_initialized():
        dist.destroy_process_group()


def train(args, selection, held_out, header, saved, device, rank, world):
    model, optimizer = build(args, device)
    precision = getattr(torch, header["settings"]["precision"])
    steps = header["settings"]["steps"]
    _, per_epoch = epoch_size(selection, args)
    first, log, measured = 0, [header], []  # measured: of each step since the log's last line
    if saved:
        first, log, measured = saved["step"], saved["log"], saved["measured"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    trained = distributed(model, device) if world > 1 else model
    trained.train()
    take_step = partial(train_step, trained, optimizer, args=args, precision=precision)
    if header["step"] == "graph":
        sizes = {len(indices): (0, indices) for indices in epoch_batches(selection, args, 0)}
        examples = list(batches.stream(selection, args, sizes.values(), device))
        take_step = graphed(take_step, model, optimizer, examples)

    where = (device, rank, world)
    coming = batches.stream(selection, args, batches.steps(selection, args, first), *where)
    last_save, last_log = time.perf_counter(), -math.inf
    with tqdm(initial=first, total=steps, unit="step", disable=rank > 0) as progress:
        for step in range(first, steps):
            started = time.perf_counter()
            batch = next(coming)
            waited = time.perf_counter() - started

            lr = simclr.learning_rate(step, steps, args.warmup, args.lr)
            metrics = take_step(lr, batch)

            epoch_ends = (step + 1) % per_epoch == 0 or step + 1 == steps
            save_now = rank == 0 and time.perf_counter() - last_save > SAVE_EVERY
            if epoch_ends or save_now or step % LOOK_EVERY == 0:
                progress.set_postfix(loss=check_loss(args.run, step, metrics))
            progress.update()
            views = 2 * len(batch.slices) * world
            measured.append((metrics, batch.dose, views, waited, time.perf_counter() - started))
            if epoch_ends:
                log.append(epoch_line(step, per_epoch, lr, measured))
                measured = []
                if held_out:
                    log[-1] |= held_out_metrics(model, held_out, args, precision, *where)
                if rank == 0 and (step + 1 == steps or time.perf_counter() - last_log > LOG_EVERY):
                    write_log(args.run, log)
                    last_log = time.perf_counter()
            if save_now:
                save_checkpoint(args.run, step + 1, log, measured, model, optimizer)
                last_save = time.perf_counter()

    if rank == 0:
        finish(args.run, log, model)


def train_step(model, optimizer, lr, batch, args, precision):
    """One optimiser step on a batches.Batch, lr a number or a tensor: the metrics of loss_of."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss, metrics = loss_of(model, batch, args, precision)
    optimizer.zero_grad()
    # gradients are averaged over processes, but each has only the part of its own views
    (loss * simclr.processes()).backward()
    optimizer.step()
    return metrics


def loss_of(model, batch, args, precision):
    """(NT-Xent of a batches.Batch, METRICS as a tensor, among them contrastive top-1)."""
    views = simclr.augment(batch.slices, batch.augmentation, args.size)
    with torch.autocast(views.device.type, precision, enabled=precision != torch.float32):
        embeddings = model(to_input(views))
    loss, top1 = simclr.nt_xent(embeddings, args.temperature, batch.excluded)
    z = torch.nn.functional.normalize(embeddings.detach().float(), dim=1)
    positive = torch.cosine_similarity(*z.chunk(2)).mean()
    return loss, torch.stack([loss.detach(), top1, z.std(0).mean(), positive])


def graphed(take_step, model, optimizer, examples):
    """take_step as CUDA graphs, one for each size of a batch: the GPU waits for Python no more.

    examples: a Batch of each size, the largest first, for graphs share memory; later batches are
    copied over them and a graph replayed, all on one stream, so that none overtakes the other. As
    in PyTorch's notes, steps come before in which all is set up; what they change is put back.
    """

    def changed():
        states = [tensor for state in optimizer.state.values() for tensor in state.values()]
        return [*model.state_dict().values(), *states]  # also batch norm's statistics

    for group in optimizer.param_groups:
        group["capturable"] = True  # AdamW asks for it
    rate = torch.zeros((), device=examples[0].slices.device)
    before = [tensor.cpu() for tensor in changed()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for batch in 3 * examples:
            take_step(rate, batch)
    torch.cuda.current_stream().wait_stream(side)
    for tensor, value in zip_longest(changed(), before, fillvalue=torch.zeros(())):
        tensor.copy_(value)  # 0 where the optimiser has made it just now
    pool, graphs = torch.cuda.graph_pool_handle(), {}
    for batch in examples:
        optimizer.zero_grad()  # so that gradients lie in the graphs' memory
        graph = torch.cuda.CUDAGraph()
        # not "global", in which a reader of other batches that pins memory breaks the capture
        with torch.cuda.graph(graph, pool, side, capture_error_mode="thread_local"):
            metrics = take_step(rate, batch)
        graphs[len(batch.slices)] = graph, batch, metrics

    def replay(lr, batch):
        graph, inputs, metrics = graphs[len(batch.slices)]
        rate.fill_(lr)
        for target, source in zip(inputs, batch, strict=True):
            if torch.is_tensor(source):
                target.copy_(source)
        graph.replay()
        return metrics.clone()

    return replay


@torch.no_grad()
def held_out_metrics(model, held_out, args, precision, *where):
    """{"held_out_loss", "held_out_positive"}: means over batches and views that stay the same.

    Batch norm takes its running statistics, as in all later use of the encoder: an embedding does
    not depend on the slices beside it, and nothing is updated.
    """
    model.eval()
    epoch = enumerate(epoch_batches(held_out, args, 0))
    coming = batches.stream(held_out, args, epoch, *where)
    measured = [loss_of(model, batch, args, precision)[1] for batch in coming]
    model.train()
    loss, _, _, positive = torch.stack(measured).mean(0).tolist()
    return {"held_out_loss": round(loss, 5), "held_out_positive": round(positive, 5)}


def parse_args():
    parser = files.Flags(description=__doc__)
    add = parser.add_argument
    count = number(int, least=1)
    positive = number(least=1e-12)
    share = number(least=0, most=1)
    bits = number(int, least=0, most=64)
    seed = number(int, least=0, most=2**32 - 1)
    add("selection", type=Path, metavar="SELECTION.csv", help="of reduce.py, its store beside it")
    add("run", type=Path, metavar="RUN", help="folder for the encoder, the log and the checkpoint")
    add("--arch", choices=ARCHS, default="resnet50", help="default: the paper's")
    size = number(int, least=SMALLEST)
    add("--size", type=size, default=96, help="side of a view in pixels (default: %(default)s)")
    add("--epochs", type=count, default=800, help="default: 800, the paper's at most")
    add("--steps", type=count, help="optimiser steps, instead of --epochs")
    add("--steps-of", type=steps_of, dest="steps", metavar="RUN", help="as many as RUN's")
    add("--batch-size", type=count, default=128, help="slices, of two views each (paper: 128)")
    add("--optimizer", choices=["lars", "adamw"], default="lars", help="paper: lars")
    add("--lr", type=positive, help="peak (lars: 0.3 x batch size / 256, SimCLR; adamw: 0.001)")
    add("--weight-decay", type=number(least=0), default=1e-6, help="of weights (paper: of all)")
    add("--warmup", type=share, default=10 / 800, help="share of the steps (SimCLR: 10 epochs)")
    add("--temperature", type=positive, default=0.1, help="of NT-Xent (SimCLR: 0.1)")
    sample = "slices of an epoch: kept; all of the store; or one drawn from each cluster, anew"
    add("--sample", choices=["kept", "all", "clusters"], default="kept", help=sample)
    add("--hold-out", type=share, default=0.0, help="share of volumes not trained on, but logged")
    add("--neighbours", type=count, default=1, metavar="C", help="batches of runs of C neighbours")
    add("--mask-negatives", type=bits, metavar="BITS", help="near-duplicates are no negatives")
    add("--mask-random", action="store_true", help="its control: as many go, drawn at random")
    add("--loss-groups", type=count, default=1, metavar="G", help="negatives within G parts alone")
    precision = "auto: bfloat16 where the hardware has it"
    add("--precision", choices=["auto", "float32", "bfloat16"], default="auto", help=precision)
    add("--seed", type=seed, default=0, help="of the weights, the order and the augmentation")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    args = parser.parse_args()
    if args.mask_random and args.mask_negatives is None:
        fail("--mask-random needs --mask-negatives, whose number of negatives it takes away")
    if args.mask_random and args.loss_groups > 1:
        fail("--mask-random draws from the whole batch: it does not go with --loss-groups")
    if args.lr is None:
        args.lr = 0.3 * args.batch_size / 256 if args.optimizer == "lars" else 1e-3
    return args


def steps_of(run):
    """The `type` of --steps-of: the optimiser steps of the run in that folder."""
    first, *_ = files.read_json(Path(run) / "log.jsonl", lines=True) or [{}]
    if "settings" not in first:
        fail(f"--steps-of {run}: no run there, or none that has come to the end of an epoch")
    return first["settings"]["steps"]


def join_processes(device):
    """(rank, number of processes): one process, or those that torchrun started."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def describe(args, selection, device, world, held_out=None):
    """The first line of the log: what makes this run, and the machine that it runs on."""
    precision = choose_precision(args.precision, device)
    needs = f"2 for each of {args.loss_groups} --loss-groups, 1 for each of {world} processes"
    for part in (held_out or selection, selection):
        slices, per_epoch = epoch_size(part, args)
        smallest = slices // max(per_epoch, 1)
        if smallest < max(2 * args.loss_groups, world):
            found = f"{slices} slices {'held out' if part is held_out else 'to train on'}"
            fail(f"{args.selection}: {found} make batches of {smallest}: a batch needs {needs}")
    apart = ("selection", "run", "epochs", "device")  # told by what follows, or only say where
    flags = {name: value for name, value in vars(args).items() if name not in apart}
    settings = flags | {
        "precision": str(precision).removeprefix("torch."),
        "slices": slices,
        "steps": args.steps or args.epochs * per_epoch,
        "processes": world,
        "selection": selection.digest,
    }
    return {
        "command": " ".join(sys.argv),
        "settings": settings,
        "code": files.code(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "step": "graph" if device.type == "cuda" and world == 1 else "eager",
        "threads": torch.get_num_threads(),
        "versions": files.versions(),
    }


def build(args, device):
    """The network, with weights from the seed, and its optimiser."""
    torch.manual_seed(args.seed)
    model = simclr.build(args.arch).to(device, memory_format=torch.channels_last)
    groups = simclr.parameter_groups(model, args.weight_decay)
    if args.optimizer == "lars":
        return model, simclr.LARS(groups, args.lr)
    return model, torch.optim.AdamW(groups, args.lr, fused=True)


def distributed(model, device):
    """The model, its gradients averaged over processes, on GPUs also its batch norm."""
    if device.type == "cpu":
        return torch.nn.parallel.DistributedDataParallel(model)
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return torch.nn.parallel.DistributedDataParallel(model, [device])


# --- What a run writes, and how it goes on.


def open_run(run, header, rank, device):
    """The checkpoint of an unfinished run, None for a new one.

    Ends the script on a finished run, and on one of other settings or of other code.
    """
    remedy = "give another RUN, or delete this one"
    encoder, checkpoint = run / "encoder.pt", run / "checkpoint.pt"
    if encoder.exists():
        made = files.read_json(run / "log.jsonl", lines=True) or [None]
        files.refuse_other(run, made[0], header["settings"], remedy)
        if rank == 0:
            checkpoint.unlink(missing_ok=True)  # of a run killed in its last moment
            print(f"{encoder}: finished before, nothing to do")
        sys.exit()
    if not checkpoint.exists():
        return None
    try:
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
    except Exception:  # whatever a damaged file makes torch raise
        fail(f"{checkpoint}: damaged: {remedy}")
    files.refuse_other(run, saved["log"][0], header["settings"], remedy)
    if rank == 0:
        print(f"{run}: going on at step {saved['step']}")
    return saved


def check_loss(run, step, metrics):
    """The loss as a number; stops a run where it is none."""
    loss = metrics[0].item()
    if not math.isfinite(loss):
        fail(f"{run}: the loss is {loss} at step {step + 1}: start again with a lower --lr")
    return round(loss, 3)


def epoch_line(step, per_epoch, lr, measured):
    """A line of the log: means over the epoch's steps, speed, share of time waiting for data.

    images_per_second counts views, two a slice.
    """
    metrics, dose, views, waited, seconds = zip(*measured, strict=True)
    means = zip(METRICS, torch.stack(metrics).mean(0).tolist(), strict=True)
    return {
        "epoch": step // per_epoch + 1,
        "step": step + 1,
        **{name: round(mean, 5) for name, mean in means},
        "lr": lr,
        "dose": round(sum(dose) / len(dose), 4),
        "images_per_second": round(sum(views) / sum(seconds), 1),
        "seconds": round(sum(seconds), 3),
        "waiting": round(sum(waited) / sum(seconds), 4),
    }


def save_checkpoint(run, step, log, measured, model, optimizer):
    weights = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save(run / "checkpoint.pt", {"step": step, "log": log, "measured": measured} | weights)


def finish(run, log, model):
    encoder = model[0].state_dict()
    save(run / "encoder.pt", {key: value.cpu().contiguous() for key, value in encoder.items()})
    (run / "checkpoint.pt").unlink(missing_ok=True)
    seconds = sum(line["seconds"] for line in log[1:])
    last = log[-1]
    print(
        f"{log[0]['settings']['slices']} slices an epoch, {last['step']} steps, {seconds:.0f} s, "
        f"loss {last['loss']:.3f}, dose {last['dose']:.2f} -> {run / 'encoder.pt'}"
    )


def write_log(run, lines):
    with files.atomic_write(run / "log.jsonl", text=True) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def save(path, state):
    packed = io.BytesIO()  # PyTorch's own writer hides why a disk takes no more
    torch.save(state, packed)
    with files.atomic_write(path) as file:
        file.write(packed.getbuffer())


if __name__ == "__main__":
    files.run_script(main)
