"""
Trains the model of vlm.py on a GPU, an Apple chip or a CPU, or on several by torchrun.

    python train.py                                      from nothing, on drawn shapes, in minutes on a laptop
    python train.py --batch_size=32                      any setting below is changed like this
    python train.py --preset=small --dataset=photos/captions.txt --augment    your photos (README)
    python train.py --init_from=resume                   on after a stop, with that run's settings
    torchrun --standalone --nproc_per_node=4 train.py --preset=small --dataset=photos/captions.txt
"""
import csv, math, os, signal, sys, textwrap, time
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel

from vlm import (PRESETS, MinimalVLM, Shapes, Tokenizer, UserError, collate, encode_prompt, image_transform,
                 load_checkpoint, make_dataset, override, save_checkpoint, to_rgb)

# settings ---------------------------------------------------------------------------------------------------
# I/O
out_dir = 'out'                  # folder for ckpt.pt, log.csv and samples.png
init_from = 'scratch'            # 'scratch' or 'resume': from out_dir/ckpt.pt, with the settings of that run
eval_interval = 500              # > 0; steps between evaluations, each of which saves
log_interval = 50                # > 0; steps between lines of the log
eval_iters = 20                  # > 0; held-out batches for the validation loss
eval_samples = 300               # >= 0; held-out items answered in words at each evaluation, 0 = none
final_samples = 1000             # >= 0; at the end of a run on shapes: scenes of each kind answered in words, 0 = none
eval_only = False                # true: with init_from=resume, evaluate and stop
overwrite = False                # true: may replace a checkpoint of a run with other settings
# data
dataset = 'shapes'               # 'shapes', a caption file (.csv .txt .jsonl .json) or a folder of class folders ...
val_dataset = ''                 # the same for validation; '' = a fixed 5 % of the images of dataset
image_dir = ''                   # where the images of a caption file are; '' = beside it
augment = False                  # true: random crops and colours; not for texts that say where things are
num_workers = -1                 # >= -1; processes that prepare batches, 0 = none but this, -1 = as many as help
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
learning_rate = 3e-3             # > 0; of AdamW
muon_lr = 0.02                   # > 0; of Muon
max_iters = 1000                 # >= 0; steps
weight_decay = 0.0               # >= 0; on matrices only
beta1 = 0.9                      # >= 0 and < 1; of AdamW
beta2 = 0.95                     # >= 0 and < 1; of AdamW
grad_clip = 1.0                  # >= 0; longest gradient, 0 = any
freeze = ''                      # parts that do not learn: vision, projection, decoder, with commas; '' = none
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
    globals().update({k: v for k, v in checkpoint['settings'].items() if k not in ('out_dir', 'init_from', 'eval_only')})
    override(globals())
settings = {k: v for k, v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, str))}

# device, precision, processes: of several, each takes every world-th item of a batch
world, rank = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))
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
if dtype == 'auto':              # bf16 doubles the speed of a CPU that has matrix units for it, and halves any other's
    fast_cpu = kind == 'cpu' and getattr(torch.cpu, 'get_capabilities', dict)().get('amx_bf16')
    fast_gpu = kind == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = 'bfloat16' if fast_cpu or fast_gpu else 'float16' if kind == 'cuda' else 'float32'
precision = torch.autocast(kind, getattr(torch, dtype)) if dtype != 'float32' else nullcontext()
torch.set_float32_matmul_precision('high')
torch.manual_seed(seed)
say = print if rank == 0 else lambda *text: None

# data -------------------------------------------------------------------------------------------------------

class Order(torch.utils.data.Sampler):
    """Which items make up which batch, by seed and position alone: so a run resumes, and processes share."""
    def __init__(self, length, first):
        self.length, self.first, self.epoch = length, first, None

    def number(self, position):
        epoch, i = divmod(position, self.length)
        if epoch != self.epoch:
            shuffle = torch.Generator().manual_seed(seed + epoch)
            self.epoch, self.order = epoch, torch.randperm(self.length, generator=shuffle)
        return position, int(self.order[i])

    def __iter__(self):
        while True:
            yield [self.number(p) for p in range(self.first + rank, self.first + batch_size, world)]
            self.first += batch_size

class Numbered(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __getitem__(self, number):
        return number[0], self.items[number[1]]

def batches(items, first=0, augment=False):
    """An endless stream of (images, input_ids, targets) from the first-th item on."""
    transform = image_transform(model.cfg, augment)
    def prepare(numbered):               # augmentation depends on seed and position, not on the process
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + numbered[0][0])
            return collate([item for _, item in numbered], model.cfg, tok, transform)
    workers = num_workers                # shapes on a CPU: workers take more from training than they give
    if workers < 0:
        workers = 0 if kind == 'cpu' and dataset == 'shapes' else min(8, os.cpu_count())
    more = dict(num_workers=workers, multiprocessing_context='fork',
                worker_init_fn=lambda i: signal.signal(signal.SIGINT, signal.SIG_IGN))
    return iter(torch.utils.data.DataLoader(Numbered(items), batch_sampler=Order(len(items), first), collate_fn=prepare,
                                            pin_memory=kind == 'cuda', **(more if workers and hasattr(os, 'fork') else {})))

def to_device(images, *rest):
    """Images in channels_last, in which convolutions are faster; copies overlap with computation on a GPU."""
    return [images.to(device, non_blocking=True, memory_format=torch.channels_last),
            *(t.to(device, non_blocking=True) for t in rest)]

size = image_size or PRESETS[preset].image_size
train_items, val_items = (make_dataset(dataset, split, image_dir, val_dataset, size, seed) for split in ('train', 'val'))

# model and optimizer ----------------------------------------------------------------------------------------

if init_from == 'scratch':
    path, checkpoint, cfg = os.path.join(out_dir, 'ckpt.pt'), {}, PRESETS[preset]
    if os.path.exists(path) and not overwrite:
        old = load_checkpoint(path)[1]['settings']
        for k in settings:
            if k not in ('out_dir', 'overwrite') and old.get(k) != settings[k]:
                raise UserError(f'{path} is of a run with {k}={old.get(k)}: choose another --out_dir, or --overwrite')
    tok = Tokenizer.make(tokenizer or cfg.tokenizer, train_items.texts, vocab_size or cfg.vocab_size)
    changes = {k: v for k, v in dict(image_size=image_size, block_size=block_size, projection=projection).items() if v}
    if dropout >= 0:
        changes.update(vision=replace(cfg.vision, dropout=dropout), text=replace(cfg.text, dropout=dropout))
    model = MinimalVLM(replace(cfg, vocab_size=tok.n_vocab, tokenizer=tok.name, **changes))
else:
    tok = checkpoint['tokenizer']
model.to(device, memory_format=torch.channels_last)
model.vision.grad_checkpointing = model.decoder.grad_checkpointing = grad_checkpointing

class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal: directions that are rare in a matrix count like those that are common.

    Keller Jordan 2024, kellerjordan.github.io/posts/muon. Unlike torch.optim.Muon it takes convolutions too, as
    matrices (output, all else), and sends all matrices of one shape through Newton-Schulz together.
    """
    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=0.0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}
            for p in (p for p in group['params'] if p.grad is not None):
                mean = self.state[p].setdefault('mean', torch.zeros_like(p)).lerp_(p.grad, 1 - group['momentum'])
                alike.setdefault(p.flatten(1).shape, []).append((p, p.grad.lerp(mean, group['momentum']).flatten(1)))
            for (rows, columns), pairs in alike.items():
                x = orthogonal(torch.stack([update for _, update in pairs]))
                for (p, _), update in zip(pairs, x):
                    p.mul_(1 - group['lr'] * group['weight_decay'])
                    p.add_(update.view(p.shape), alpha=-group['lr'] * max(1, rows / columns) ** 0.5)

def orthogonal(x):
    """Newton-Schulz: drives all singular values of the matrices x (n,rows,columns) towards 1; bf16 will do."""
    tall = x.size(1) > x.size(2)
    y = (x.mT if tall else x).to(torch.bfloat16 if dtype == 'bfloat16' else x.dtype)
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = 3.4445 * y + (2.0315 * gram @ gram - 4.775 * gram) @ y
    return (y.mT if tall else y).to(x.dtype)

def by_part(text):
    """'vision=0.1,decoder=0.1' or 'vision,decoder' -> {part: the number, or nothing, behind its name}."""
    parts = dict((item + '=').split('=')[:2] for item in text.split(',') if item)
    if unknown := set(parts) - {'vision', 'projection', 'decoder'}:
        raise UserError(f'{text}: there is no part {min(unknown)!r}, only vision, projection and decoder')
    return parts

def make_optimizers():
    """Muon for hidden matrices; AdamW for embeddings, the first convolution, norms and biases, or for all."""
    groups, scales = {}, by_part(lr_scale)
    for name, p in model.named_parameters():
        outer = p.dim() < 2 or any(s in name for s in ('embedding', 'position', 'stem.0', 'latents', 'class_token'))
        if p.requires_grad:
            groups.setdefault((outer or optimizer == 'adamw', name.split('.')[0], p.dim() < 2), []).append(p)
    made = []
    for adamw, rate in ((False, muon_lr), (True, learning_rate)):
        mine = [dict(params=ps, full_lr=rate * float(scales.get(part, 1)), weight_decay=0.0 if thin else weight_decay)
                for (which, part, thin), ps in groups.items() if which == adamw]
        if mine:
            made.append(torch.optim.AdamW(mine, rate, (beta1, beta2), fused=True) if adamw else Muon(mine, rate))
    return made or [torch.optim.AdamW(model.parameters(), full_lr=0.0)]

frozen = [getattr(model, part) for part in by_part(freeze)]
for part in frozen:
    part.requires_grad_(False)
optimizers, scaler = make_optimizers(), torch.amp.GradScaler(kind, enabled=dtype == 'float16')
net = torch.compile(model) if compile else model
net = DistributedDataParallel(net) if world > 1 else net

def lr_factor(step):
    """A straight rise over warmup_iters, then a straight fall to min_lr at lr_decay_iters."""
    end = lr_decay_iters or max_iters
    left = min(1.0, max(0.0, (end - step) / max(1, end - warmup_iters))) if decay_lr else 1.0
    return min(1.0, (step + 1) / (warmup_iters + 1)) * (min_lr + (1 - min_lr) * left)

# evaluation -------------------------------------------------------------------------------------------------

@torch.no_grad()
def validation_loss():
    """Nats a token on held-out items, and the same with each image swapped for its neighbour's."""
    model.eval()
    sums, count = [0.0, 0.0], 0
    for _, batch in zip(range(eval_iters), batches(val_items)):
        images, ids, targets = to_device(*batch)
        n = int((targets != -100).sum())
        for i, shown in enumerate((images, images.roll(1, 0))):
            with precision:
                sums[i] += float(model(shown, ids, targets, return_logits=False)[1]) * n
        count += n
    return sums[0] / count, sums[1] / count

def answers(items, n):
    """The model's greedy answers to the first n items: (image, prompt, truth, answer) each."""
    transform = image_transform(model.cfg)
    for i in range(0, min(n, len(items)), 100):
        batch = [items[j] for j in range(i, min(i + 100, n, len(items)))]
        images, = to_device(torch.stack([transform(image) for image, _, _ in batch]))
        prompts = [torch.tensor(encode_prompt(tok, model.cfg, item[1]), dtype=torch.long, device=device) for item in batch]
        with precision:
            rows = model.generate(images, prompts, max_new_tokens=50, temperature=0, stop=tok.eos)
        for item, prompt, row in zip(batch, prompts, rows):
            yield *item, tok.decode(row[len(prompt):].tolist()).strip()

def exact(items, n, title):
    """Prints and returns the share of n items answered word for word, also for each way a prompt begins."""
    kinds = {}
    for _, prompt, truth, said in answers(items, n):
        kinds.setdefault(' '.join(prompt.split()[:2]) or 'caption', []).append(said == truth)
    share = sum(map(sum, kinds.values())) / max(1, sum(map(len, kinds.values())))
    most = sorted(kinds, key=lambda k: -len(kinds[k]))[:8] if len(kinds) > 1 else []
    each = ', '.join(f'{k} {sum(kinds[k]) / len(kinds[k]):.1%}' for k in sorted(most))
    say(f'  word for word right: {share:.1%} of {title}' + (f' ({each})' if each else ''))
    return share

def contact_sheet(items, path, columns=4, rows=3, cell=240):
    """Held-out pictures with what the model says of each: green where it is what the data say, else red."""
    sheet = Image.new('RGB', (columns * cell, rows * (cell + 60)), 'white')
    for i, (image, prompt, truth, said) in enumerate(answers(items, columns * rows)):
        x, y = i % columns * cell + 5, i // columns * (cell + 60) + 5
        sheet.paste(to_rgb(image).resize((cell - 10, cell - 10)), (x, y))
        text = '\n'.join(textwrap.wrap(f'{prompt} {said}'.strip(), 36)[:3])
        ImageDraw.Draw(sheet).text((x, y + cell - 8), text, 'green' if said == truth else 'firebrick',
                                   ImageFont.load_default(13))
    sheet.save(path)

def evaluate(last=False):
    if rank == 0:
        loss, swapped = validation_loss()
        say(f'step {step}: held-out loss {loss:.4f}; {swapped:.4f} with images swapped, image gain {swapped - loss:.4f}')
        share = exact(val_items, eval_samples, f'{eval_samples} held-out items') if eval_samples else ''
        if last and dataset == 'shapes' and final_samples:
            exact(Shapes('val', seed, 'caption'), final_samples, f'{final_samples} captions of seen pairs')
            exact(Shapes('novel', seed, 'caption'), final_samples, f'{final_samples} captions of pairs never seen')
            exact(Shapes('val', seed, 'question'), final_samples, f'{final_samples} questions')
        contact_sheet(val_items, os.path.join(out_dir, 'samples.png'))
        log.writerow([step, f'{time.time() - started:.1f}', '', f'{loss:.5f}', f'{swapped:.5f}', share])
        log_file.flush()
    model.train()
    for part in frozen:                  # their batch norms keep what they know
        part.eval()

def save():
    if rank == 0:
        state = [torch.get_rng_state(), torch.cuda.get_rng_state() if kind == 'cuda' else None]
        save_checkpoint(path, model, tok, step=step, settings=settings, random=state, scaler=scaler.state_dict(),
                        optimizers=[o.state_dict() for o in optimizers])

# the run ----------------------------------------------------------------------------------------------------

path, step, started, stop = os.path.join(out_dir, 'ckpt.pt'), checkpoint.get('step', 0), time.time(), []
if step:
    for o, state in zip(optimizers, checkpoint['optimizers']):
        o.load_state_dict(state)
    scaler.load_state_dict(checkpoint['scaler'])
    torch.set_rng_state(checkpoint['random'][0])
    if kind == 'cuda' and checkpoint['random'][1] is not None:
        torch.cuda.set_rng_state(checkpoint['random'][1])
try:
    os.makedirs(out_dir, exist_ok=True)
    log_file = open(os.path.join(out_dir, 'log.csv') if rank == 0 else os.devnull, 'a' if step else 'w', newline='')
except OSError as e:
    raise UserError(f'cannot write to out_dir={out_dir}: {e}') from e
log = csv.writer(log_file)
if not step:
    log.writerow(['step', 'seconds', 'loss', 'val_loss', 'val_loss_swapped', 'word_for_word'])
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: stop.append(number))
millions = {part: sum(p.numel() for p in getattr(model, part).parameters()) / 1e6 for part in ('vision', 'projection', 'decoder')}
say(f'{preset}: {sum(millions.values()):.2f}M parameters, {", ".join(f"{k} {v:.2f}M" for k, v in millions.items())}; '
    f'{tok.name} tokenizer, {tok.n_vocab} tokens; {len(train_items)} items, {len(val_items)} held out; {device}, {dtype}')
if eval_only:
    evaluate(last=True)
    sys.exit(0)

stream = batches(train_items, step * gradient_accumulation_steps * batch_size, augment)
model.train()
for part in frozen:
    part.eval()
losses, bad, since = [], 0, time.time()
while step < max_iters and not stop:
    # 1. the batches of this step, and how many tokens they score: each weighs the same, whichever batch it is in
    parts = [next(stream) for _ in range(gradient_accumulation_steps)]
    scored = torch.tensor([float((targets != -100).sum()) for _, _, targets in parts], device=device)
    total = scored.sum()
    if world > 1:
        dist.all_reduce(total)
    # 2. gradients, summed over batches, and over processes with the last one
    loss_sum = torch.zeros((), device=device)
    for i, part in enumerate(parts):
        with net.no_sync() if world > 1 and i + 1 < len(parts) else nullcontext():
            with precision:
                loss = net(*to_device(*part), return_logits=False)[1] * scored[i] / total
            scaler.scale(loss * world).backward()
        loss_sum += loss.detach()
    # 3. clip and step, unless the gradient is not finite
    for o in optimizers:
        scaler.unscale_(o)
        for group in o.param_groups:
            group['lr'] = group['full_lr'] * lr_factor(step)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    finite = bool(torch.isfinite(norm))
    bad = 0 if finite else bad + 1
    if not finite:
        say(f'step {step}: the gradient is not finite, step left out')
    if bad == (5 if dtype != 'float16' else 30):         # a gradient scaler needs some such steps to find its scale
        raise UserError(f'{bad} steps without a finite gradient: try half the --learning_rate and --muon_lr, or '
                        f'--dtype=float32; {path} is as it was')
    for o in optimizers:
        if finite or dtype == 'float16':
            scaler.step(o)
        o.zero_grad(set_to_none=True)
    scaler.update()
    step += 1
    # 4. tell, evaluate, save
    losses.append(loss_sum)
    if step % log_interval == 0:
        mean = torch.stack(losses).mean()
        if world > 1:
            dist.all_reduce(mean)
        seconds = (time.time() - since) / len(losses)
        rate, left = batch_size * gradient_accumulation_steps / seconds, int((max_iters - step) * seconds)
        memory = f', {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB' if kind == 'cuda' else ''
        say(f'step {step}/{max_iters}: loss {float(mean):.4f}, {seconds * 1e3:.0f} ms, {rate:.0f} images/s{memory}, '
            f'{left // 60}m{left % 60:02d}s left')
        log.writerow([step, f'{time.time() - started:.1f}', f'{float(mean):.5f}', '', '', ''])
        losses, since = [], time.time()
    if step % eval_interval == 0 and step < max_iters:
        pause = time.time()
        evaluate()
        save()
        since += time.time() - pause
save()
if stop:
    say(f'stopped at step {step}: --init_from=resume goes on')
else:
    evaluate(last=True)
    say(f'{step} steps, {time.time() - started:.0f} s. Now: python sample.py --out_dir={out_dir}')
if world > 1:
    dist.destroy_process_group()
