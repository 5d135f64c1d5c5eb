"""
Trains the model of vlm.py on a GPU, an Apple chip or a CPU, or on several by torchrun.

    python train.py                                      from nothing, on drawn shapes, in minutes on a laptop
    python train.py --batch_size=32                      any setting below is changed like this
    python train.py --preset=small --dataset=photos/captions.txt --augment    your photos (README)
    python train.py --init_from=resume                   on after a stop, with that run's settings
    torchrun --standalone --nproc_per_node=4 train.py --preset=small --dataset=photos/captions.txt
"""
import itertools, math, os, re, signal, textwrap, time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import distributed as dist
from vlm import (PRESETS, MinimalVLM, Shapes, Tokenizer, UserError, collate, encode_prompt, image_transform,
                 load_checkpoint, make_dataset, override, save_checkpoint, to_rgb)

# settings ---------------------------------------------------------------------------------------------------
# I/O
out_dir = 'out'                  # folder for ckpt.pt, log.csv and samples.png
init_from = 'scratch'            # 'scratch' or 'resume': from out_dir/ckpt.pt, with the settings of that run
eval_interval = 500              # > 0; steps between evaluations, each of which saves
log_interval = 50                # > 0; steps between lines of the log
eval_iters = 20                  # > 0; held-out batches for the validation loss
eval_samples = 200               # >= 0; held-out items answered in words, 0 = none; after a run on shapes 15 times
eval_only = False                # true: with init_from=resume, evaluate and stop
overwrite = False                # true: may replace a checkpoint of a run with other settings
# data
dataset = 'shapes'               # 'shapes', a caption file (.csv .txt .jsonl .json), a folder of class folders ...
val_dataset = ''                 # the same for validation; '' = a fixed 5 % of the images of dataset
image_dir = ''                   # where the images of a caption file are; '' = beside it
augment = False                  # true: random crops and colours; not for texts that say where things are
num_workers = -1                 # >= -1; processes that prepare batches, 0 = this one, -1 = as many as help
batch_size = 64                  # > 0; items in a batch, over all processes
gradient_accumulation_steps = 1  # > 0; batches in a step
# model
preset = 'tiny'                  # 'tiny', 'small', 'base' or 'nanovlm'; see PRESETS in vlm.py
tokenizer = ''                   # '', 'bytes', 'bpe' (learned from the texts) or 'gpt2'; '' = the preset's
vocab_size = 0                   # >= 0; most tokens for bpe to learn, 0 = the preset's
image_size = 0                   # >= 0; pixels a side, 0 = the preset's
block_size = 0                   # >= 0; tokens in a sequence with the image, 0 = the preset's
projection = ''                  # '', 'linear', 'mlp', 'pixel_shuffle' or 'perceiver'; '' = the preset's
dropout = -1.0                   # >= -1 and < 1; in eye and mouth, -1 = the preset's
# optimizer
optimizer = 'muon'               # 'muon' (hidden matrices, the rest AdamW) or 'adamw'
balance = 0.5                    # >= 0 and <= 1; 0: each token weighs the same, 1: each answer, however long
learning_rate = 3e-3             # > 0; of AdamW
muon_lr = 0.02                   # > 0; of Muon
max_iters = 1000                 # >= 0; steps
weight_decay = 0.4               # >= 0; on matrices only
beta1 = 0.9                      # >= 0 and < 1; of AdamW
beta2 = 0.95                     # >= 0 and < 1; of AdamW
grad_clip = 1.0                  # >= 0; longest gradient, 0 = any
freeze = ''                      # parts that do not learn, of vision, projection and decoder; '' = none
lr_scale = ''                    # factors on the rates of parts, as vision=0.1,decoder=0.1; '' = none
decay_lr = True                  # false: the learning rate stays as it is after the warm-up
warmup_iters = 50                # >= 0; steps in which the learning rate rises
lr_decay_iters = 0               # >= 0; step by which it has fallen to min_lr, 0 = max_iters
min_lr = 0.0                     # >= 0 and <= 1; as a fraction of the full rate
# system
device = 'auto'                  # 'auto', 'cpu', 'mps', 'cuda', 'cuda:1' ...
dtype = 'auto'                   # 'auto', 'float32', 'bfloat16' or 'float16' (with a gradient scaler)
grad_checkpointing = False       # true: compute activations again in the backward pass; less memory, slower
compile = False                  # true: torch.compile; pays on a GPU, after a minute
seed = 1337                      # >= 0; of weights, data order and scenes
# ------------------------------------------------------------------------------------------------------------
override(globals())
if init_from == 'resume':        # that run's settings, then again the command line's
    model, checkpoint = load_checkpoint(os.path.join(out_dir, 'ckpt.pt'))
    here = ('out_dir', 'init_from', 'eval_only')
    globals().update({k: v for k, v in checkpoint['settings'].items() if k not in here})
    override(globals())
settings = {k: v for k, v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, str))}

# device, precision, processes: of several, each takes every world-th item of a batch
world, rank = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))
say = print if rank == 0 else lambda text: None
if device == 'auto':
    device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
kind = device.split(':')[0]
if kind != 'cpu' and not getattr(torch, kind).is_available():
    raise UserError(f'device={device}, but PyTorch finds none here: --device=cpu, or leave it out')
if world > 1:
    device = f'cuda:{os.environ["LOCAL_RANK"]}' if kind == 'cuda' else device
    dist.init_process_group('nccl' if kind == 'cuda' else 'gloo')
if batch_size % world:
    raise UserError(f'batch_size={batch_size} must be a multiple of the {world} processes')
if dtype == 'auto':              # on CPUs with matrix units for bf16 it is twice as fast as fp32, on others slow
    fast_cpu = kind == 'cpu' and getattr(torch.cpu, 'get_capabilities', dict)().get('amx_bf16')
    fast_gpu = kind == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = 'bfloat16' if fast_cpu or fast_gpu else 'float16' if kind == 'cuda' else 'float32'
precision = torch.autocast(kind, getattr(torch, dtype)) if dtype != 'float32' else nullcontext()
torch.set_float32_matmul_precision('high')
torch.manual_seed(seed)

# data -------------------------------------------------------------------------------------------------------

class Batches(torch.utils.data.IterableDataset):
    """Batches without end, each made from seed and number alone: so that runs resume and processes share."""
    def __init__(self, items, first=0, augment=False):
        self.items, self.first, self.epoch = items, first, None
        self.transform = image_transform(model.cfg, augment)

    def item(self, position):
        epoch, i = divmod(position, len(self.items))
        if epoch != self.epoch:
            self.epoch, shuffle = epoch, torch.Generator().manual_seed(seed + epoch)
            self.order = torch.randperm(len(self.items), generator=shuffle)
        return self.items[int(self.order[i])]

    def __iter__(self):
        worker = torch.utils.data.get_worker_info() or SimpleNamespace(id=0, num_workers=1)
        for n in itertools.count(self.first + worker.id, worker.num_workers):
            items = [self.item(p) for p in range(n * batch_size + rank, (n + 1) * batch_size, world)]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + n)          # of the augmentation
                batch = collate(items, model.cfg, tok, self.transform)
            yield batch

def load(batches):
    few = 0 if kind == 'cpu' and dataset == 'shapes' else os.cpu_count()     # there workers cost more than they give
    workers = (num_workers if num_workers >= 0 else min(8, few)) * hasattr(os, 'fork')
    more = dict(multiprocessing_context='fork', worker_init_fn=lambda i: signal.signal(signal.SIGINT, signal.SIG_IGN))
    more = dict(more if workers else {}, num_workers=workers, pin_memory=kind == 'cuda', generator=torch.Generator())
    return iter(torch.utils.data.DataLoader(batches, batch_size=None, **more))

def to_device(images, *rest):
    """Images go in channels_last, in which convolutions are faster."""
    images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    return [images, *(t.to(device, non_blocking=True) for t in rest)]

size = image_size or PRESETS[preset].image_size
train_items = make_dataset(dataset, 'train', image_dir, val_dataset, size, seed)
val_items = make_dataset(dataset, 'val', image_dir, val_dataset, size, seed)

# model and optimizer ----------------------------------------------------------------------------------------

path = os.path.join(out_dir, 'ckpt.pt')
if init_from == 'scratch':
    if os.path.exists(path) and not overwrite:
        old = {**load_checkpoint(path)[1]['settings'], 'out_dir': out_dir, 'overwrite': overwrite}
        for k in (k for k in settings if old.get(k) != settings[k]):
            raise UserError(f'{path} is of a run with {k}={old.get(k)}: take another --out_dir, or --overwrite')
    cfg, checkpoint = PRESETS[preset], {'step': 0}
    tok = Tokenizer.make(tokenizer or cfg.tokenizer, train_items.texts, vocab_size or cfg.vocab_size)
    changes = dict(image_size=size, block_size=block_size or cfg.block_size, projection=projection or cfg.projection)
    if dropout >= 0:
        changes.update(vision=replace(cfg.vision, dropout=dropout), text=replace(cfg.text, dropout=dropout))
    model = MinimalVLM(replace(cfg, vocab_size=tok.n_vocab, tokenizer=tok.name, **changes))
tok = checkpoint['tokenizer'] if init_from == 'resume' else tok
model.to(device, memory_format=torch.channels_last)
model.vision.grad_checkpointing = model.decoder.grad_checkpointing = grad_checkpointing

class Muon(torch.optim.Optimizer):
    """Momentum with each matrix's step made orthogonal, so that rare directions count like common ones.
    Keller Jordan 2024, kellerjordan.github.io/posts/muon. Unlike torch.optim.Muon it takes convolutions, too, as
    matrices (output, all else), and sends matrices of one shape through Newton-Schulz together."""
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}
            for p in (p for p in group['params'] if p.grad is not None):
                mean = self.state[p].setdefault('mean', torch.zeros_like(p)).lerp_(p.grad, 0.05)
                alike.setdefault(p.flatten(1).shape, []).append((p, p.grad.lerp(mean, 0.95).flatten(1)))
            for (rows, columns), pairs in alike.items():
                for (p, _), update in zip(pairs, orthogonal(torch.stack([update for _, update in pairs]))):
                    p.mul_(1 - group['lr'] * group['weight_decay'])
                    p.add_(update.view(p.shape), alpha=-group['lr'] * max(1, rows / columns) ** 0.5)

def orthogonal(x):
    """Newton-Schulz: drives all singular values of matrices x (n,rows,columns) towards 1; bf16 will do."""
    y = (x.mT if x.size(1) > x.size(2) else x).to(torch.bfloat16 if dtype == 'bfloat16' else x.dtype)
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = 3.4445 * y + (2.0315 * gram @ gram - 4.775 * gram) @ y
    return (y.mT if x.size(1) > x.size(2) else y).to(x.dtype)

def by_part(text):
    """'vision=0.1,decoder=0.1' or 'vision,decoder' -> {part: the number, or nothing, behind its name}."""
    parts = dict((item + '=').split('=')[:2] for item in text.split(',') if item)
    for name in set(parts) - {'vision', 'projection', 'decoder'}:
        raise UserError(f'{text}: there is no part {name!r}, only vision, projection and decoder')
    return parts

def make_optimizers():
    """Muon for hidden matrices; AdamW for embeddings, the first convolution, norms and biases, or for all."""
    groups, scales = {}, by_part(lr_scale)
    for name, p in model.named_parameters():
        outer = p.dim() < 2 or re.search('embedding|position|stem.0|latents|class_token', name) is not None
        if p.requires_grad:
            groups.setdefault((optimizer == 'muon' and not outer, outer, name.split('.')[0]), []).append(p)
    made = {True: [], False: []}
    for (muon, outer, part), ps in groups.items():
        rate = (muon_lr if muon else learning_rate) * float(scales.get(part, 1))
        made[muon].append(dict(params=ps, lr=rate, full_lr=rate, weight_decay=0.0 if outer else weight_decay))
    muon = [Muon(made[True], {})] if made[True] else []
    return muon + ([torch.optim.AdamW(made[False], betas=(beta1, beta2), fused=True)] if made[False] else [])

def lr_factor(step):
    """A straight rise over warmup_iters, then a straight fall to min_lr at lr_decay_iters."""
    end = lr_decay_iters or max_iters
    left = min(1.0, max(0.0, (end - step) / max(1, end - warmup_iters))) if decay_lr else 1.0
    return min(1.0, (step + 1) / (warmup_iters + 1)) * (min_lr + (1 - min_lr) * left)

def training_mode():
    model.train()
    for part in by_part(freeze):         # batch norms in it keep what they know
        getattr(model, part).requires_grad_(False).eval()

training_mode()
optimizers, scaler = make_optimizers(), torch.amp.GradScaler(kind, enabled=dtype == 'float16')
net = torch.compile(model) if compile else model
net = torch.nn.parallel.DistributedDataParallel(net) if world > 1 else net

# evaluation -------------------------------------------------------------------------------------------------

@torch.no_grad()
def validation_loss():
    """Nats a token on held-out items, and the same with each image swapped for its neighbour's."""
    sums = torch.zeros(3)
    for _, batch in zip(range(eval_iters), load(Batches(val_items))):
        images, ids, targets = to_device(*batch)
        with precision:
            both = [model(shown, ids, targets, return_logits=False)[1] for shown in (images, images.roll(1, 0))]
        sums += torch.tensor([*map(float, both), 1.0]) * (targets != -100).sum().item()
    return (sums[:2] / sums[2]).tolist()

def answers(items, n):
    """The model's greedy answers to the first n items: (image, prompt, truth, answer) each."""
    transform = image_transform(model.cfg)
    for i in range(0, min(n, len(items)), 100):
        batch = [items[j] for j in range(i, min(i + 100, n, len(items)))]
        images, = to_device(torch.stack([transform(image) for image, _, _ in batch]))
        prompts = [torch.tensor(encode_prompt(tok, model.cfg, item[1])).long().to(device) for item in batch]
        with precision:
            rows = model.generate(images, prompts, max_new_tokens=50, temperature=0, stop=tok.eos)
        for item, prompt, row in zip(batch, prompts, rows):
            yield *item, tok.decode(row[len(prompt):].tolist()).strip()

def exact(items, n, title):
    """Prints and returns the share of n items answered word for word, also for each way a prompt begins."""
    kinds = {}
    for _, prompt, truth, said in answers(items, n):
        kinds.setdefault(' '.join(prompt.split()[:2]) or 'caption', []).append(said == truth)
    right = sum(kinds.values(), [])
    most = sorted(sorted(kinds, key=lambda k: -len(kinds[k]))[:8]) if len(kinds) > 1 else []
    say(f'  word for word right: {sum(right) / max(1, len(right)):.1%} of {len(right)} {title}'
        + ''.join(f', {k} {sum(kinds[k]) / len(kinds[k]):.1%}' for k in most))
    return sum(right) / max(1, len(right))

def contact_sheet(items, path, columns=4, rows=3, cell=240):
    """Held-out pictures with what the model says of each: green where it is what the data say, else red."""
    sheet = Image.new('RGB', (columns * cell, rows * (cell + 60)), 'white')
    for i, (image, prompt, truth, said) in enumerate(answers(items, columns * rows)):
        x, y = i % columns * cell + 5, i // columns * (cell + 60) + 5
        sheet.paste(to_rgb(image).resize((cell - 10, cell - 10)), (x, y))
        text = '\n'.join(textwrap.wrap(f'{prompt} {said}'.strip(), 36)[:3])
        color = 'green' if said == truth else 'firebrick'
        ImageDraw.Draw(sheet).text((x, y + cell - 8), text, color, ImageFont.load_default(13))
    sheet.save(path)

def evaluate(last=False):
    """Loss on held-out items with their images and with others', answers in words, and a picture of some."""
    model.eval()
    loss, swapped = validation_loss()
    say(f'step {step}: held-out loss {loss:.4f}, with images swapped {swapped:.4f}, image gain {swapped - loss:.4f}')
    share = exact(val_items, eval_samples, 'held-out items')
    if last and dataset == 'shapes':
        exact(Shapes('val', seed, 'caption'), 5 * eval_samples, 'captions')
        exact(Shapes('novel', seed, 'caption'), 5 * eval_samples, 'captions of pairs that training never drew')
        exact(Shapes('val', seed, 'question'), 5 * eval_samples, 'questions')
    contact_sheet(val_items, os.path.join(out_dir, 'samples.png'))
    note(f'{step},{time.time() - started:.1f},,{loss:.5f},{swapped:.5f},{share:.4f}')
    training_mode()

def save():
    state = [torch.get_rng_state(), torch.cuda.get_rng_state() if kind == 'cuda' else None]
    save_checkpoint(path, model, tok, step=step, settings=settings, random=state, scaler=scaler.state_dict(),
                    optimizers=[o.state_dict() for o in optimizers])

def note(line):
    with open(os.path.join(out_dir, 'log.csv'), 'a') as f:
        f.write(line + '\n')

# the run ----------------------------------------------------------------------------------------------------

step, started, stop, losses, bad = checkpoint['step'], time.time(), [], [], 0
if step:
    for o, state in zip([*optimizers, scaler], [*checkpoint['optimizers'], checkpoint['scaler']]):
        o.load_state_dict(state)
    torch.set_rng_state(checkpoint['random'][0])
    if kind == 'cuda' and checkpoint['random'][1] is not None:
        torch.cuda.set_rng_state(checkpoint['random'][1])
if rank == 0:
    os.makedirs(out_dir, exist_ok=True)
    if not step:
        open(os.path.join(out_dir, 'log.csv'), 'w').close()
        note('step,seconds,loss,val_loss,val_loss_swapped,word_for_word')
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: stop.append(number))
sizes = {k: sum(p.numel() for p in part.parameters()) / 1e6 for k, part in model.named_children()}
sizes = f'{sum(sizes.values()):.2f}M parameters (' + ', '.join(f'{k} {n:.2f}M' for k, n in sizes.items()) + ')'
say(f'{preset}: {sizes}, {tok.name} tokenizer of {tok.n_vocab}; {len(train_items)} items and {len(val_items)} held out; '
    f'{device}, {dtype}')
stream, since = load(Batches(train_items, step * gradient_accumulation_steps, augment)), time.time()
while step < max_iters and not stop and not eval_only:
    # 1. the batches of this step, and what each weighs: as much as its answers do
    parts = [next(stream) for _ in range(gradient_accumulation_steps)]
    weights = [((targets != -100).sum(1) ** (1 - balance)).sum() for *_, targets in parts]
    total = sum(weights).to(device)
    if world > 1:
        dist.all_reduce(total)
    # 2. gradients, summed over batches, and over processes with the last one
    for i, part in enumerate(parts):
        with net.no_sync() if world > 1 and i + 1 < len(parts) else nullcontext():
            with precision:
                loss = net(*to_device(*part), return_logits=False, balance=balance)[1] * weights[i] / total
            scaler.scale(loss * world).backward()
        losses.append(loss.detach())
    # 3. clip and step, unless the gradient is not finite
    for o in optimizers:
        scaler.unscale_(o)
        for group in o.param_groups:
            group['lr'] = group['full_lr'] * lr_factor(step)
    finite = bool(torch.isfinite(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)))
    bad = 0 if finite else bad + 1
    if bad:
        say(f'step {step}: the gradient is not finite, step left out')
    if bad == (5 if dtype != 'float16' else 30):     # a gradient scaler needs such steps to find its scale
        raise UserError(f'{bad} steps without a finite gradient: try half the --learning_rate and --muon_lr, '
                        f'or --dtype=float32; {path} is as it was')
    for o in optimizers:
        if finite or dtype == 'float16':
            scaler.step(o)
        o.zero_grad(set_to_none=True)
    scaler.update()
    step += 1
    # 4. tell, evaluate, save
    if step % log_interval == 0:
        mean = torch.stack(losses).sum() / log_interval
        if world > 1:
            dist.all_reduce(mean)
        seconds = (time.time() - since) / log_interval
        rate, left = batch_size * gradient_accumulation_steps / seconds, (max_iters - step) * seconds / 60
        memory = f', {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB' if kind == 'cuda' else ''
        say(f'step {step}/{max_iters}: loss {mean:.4f}, {seconds * 1e3:.0f} ms, {rate:.0f} images/s, '
            f'{left:.1f} minutes left{memory}')
        note(f'{step},{time.time() - started:.1f},{mean:.5f},,,') if rank == 0 else None
        losses, since = [], time.time()
    if step % eval_interval == 0 and step < max_iters and rank == 0:
        pause = time.time()
        evaluate()
        save()
        since += time.time() - pause
if rank == 0 and not eval_only:
    save()
if rank == 0 and not stop:
    evaluate(last=True)
say(f'stopped at step {step}: --init_from=resume goes on' if stop else
    f'{step} steps, {time.time() - started:.0f} s. Now: python sample.py --out_dir={out_dir}')
if world > 1:
    dist.destroy_process_group()
