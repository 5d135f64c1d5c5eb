"""Trains the model of vlm.py on a GPU, an Apple chip or a CPU, or on several: torchrun --nproc_per_node=4 ...

    python train.py                                   from nothing, on drawn shapes, in minutes on a laptop
    python train.py --init_from=resume                on after a stop, with that run's settings
    python train.py --batch_size=64 --out_dir=out-64  any setting below is changed like this
    python train.py --preset=small --dataset=photos/captions.txt --augment --out_dir=out-photos  your photos
"""
import contextlib, functools, math, os, re, signal, textwrap, time
from collections import ChainMap, Counter
from dataclasses import replace
os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '256')      # else a CPU's kernels fill GiBs
import torch, torch.distributed as dist, torch.utils.flop_counter
from PIL import Image, ImageDraw
from vlm import (PRESETS, PUBLIC, MinimalVLM, Shapes, Tokenizer, UserError, VLMConfig, collate, encode_prompt,
                 explained, image_transform, load_checkpoint, make_dataset, override, save_checkpoint)

# settings ---------------------------------------------------------------------------------------------------
out_dir = 'out'                  # folder for ckpt.pt, log.csv and samples.png
init_from = 'scratch'            # 'scratch', 'resume', 'pretrained', names as siglip-b-16,gpt2, files ...
eval_interval = 1000             # > 0; steps between evaluations, each of which saves
log_interval = 50                # > 0; steps between lines of the log
eval_iters = 20                  # > 0; held-out batches for the validation loss; image gain: of 2 or more
eval_samples = 200               # >= 0; held-out items answered in words, 0 = none; 16 times at shapes' end
eval_only = False                # true: with init_from=resume, evaluate and stop
overwrite = False                # true: a new run may replace the checkpoint in out_dir
dataset = 'shapes'               # 'shapes', a caption file (.csv .txt .jsonl .json), a folder of classes ...
val_dataset = ''                 # the same for validation; '' = a fixed 5 % of the images of dataset
image_dir = ''                   # where the images of a caption file are; '' = beside it
blind = False                    # true: all images grey; what another run does better, it does by looking
contrastive = 0.0                # >= 0; weight of SigLIP's loss, which text is of which image, 0 = off
augment = False                  # true: mirrors, crops, colours at random; not for texts that say left
num_workers = -1                 # >= -1 and <= 256; processes for batches, 0 = this one, -1 = as many as help
batch_size = 16                  # > 0; images in a batch, over all processes, at least one each
texts_per_image = 10             # > 0; most texts of an image that go with it, as far as block_size has room
gradient_accumulation_steps = 1  # > 0; batches in a step
preset = 'tiny'                  # 'tiny', 'small', 'base' or 'nanovlm'; see PRESETS in vlm.py
tokenizer = ''                   # 'bytes', 'bpe' (learned), 'gpt2', a tokenizer.json; '' = the preset's ...
vocab_size = 0                   # >= 0; most tokens for bpe to learn, 0 = the preset's
image_size = 0                   # >= 0; pixels a side, 0 = the preset's
block_size = 0                   # >= 0; tokens with the image, 0 = the preset's; GPT-2's weights have 1024
projection = ''                  # '', 'linear', 'mlp', 'pixel_shuffle' or 'perceiver'; '' = the preset's
dropout = -1.0                   # >= -1 and < 1; in encoder and decoder, -1 = the preset's
optimizer = 'muon'               # 'muon' (hidden matrices, the rest AdamW) or 'adamw'
learning_rate = 2.5e-3           # > 0; of AdamW
muon_lr = 0.015                  # > 0; of Muon
max_iters = 1500                 # >= 0; steps
weight_decay = 0.4               # >= 0; on matrices only
beta1 = 0.9                      # >= 0 and < 1; of AdamW
beta2 = 0.95                     # >= 0 and < 1; of AdamW
grad_clip = 1.0                  # >= 0; maximum norm of the gradient, 0 = no clipping
freeze = ''                      # parts that do not learn, of vision, projection and decoder; '' = none
lr_scale = ''                    # factors on the rates of parts, as vision=0.1,decoder=0.1; '' = none
decay_lr = True                  # false: the learning rate stays as it is after the warm-up
warmup_iters = 50                # >= 0; steps in which the learning rate rises
lr_decay_iters = 0               # >= 0; step by which it has fallen to min_lr, 0 = max_iters
min_lr = 0.0                     # >= 0 and <= 1; as a fraction of the full rate
device = 'auto'                  # 'auto', 'cpu', 'mps', 'cuda', 'cuda:1' ...
dtype = 'auto'                   # 'auto', 'float32', 'bfloat16' or 'float16' (with a gradient scaler)
grad_checkpointing = False       # true: compute activations again in the backward pass; less memory, slower
compile = False                  # true: torch.compile, after a minute or two; for GPUs, no gain on a CPU
peak_tflops = 312.0              # > 0; of the GPU in 16 bits, for MFU; A100 312, H100 and H200 989, L4 121
seed = 1337                      # >= 0 and < 1e18; of weights, data order and scenes
# ------------------------------------------------------------------------------------------------------------
override(globals())
if init_from == 'resume':        # that run's settings, then again the command line's
    model, checkpoint = load_checkpoint(f'{out_dir}/ckpt.pt')
    globals().update(checkpoint['settings'], out_dir=out_dir, init_from=init_from, eval_only=eval_only)
    override(globals())
    model_settings = 'preset tokenizer vocab_size image_size block_size projection dropout'.split()
    if changed := [k for k in model_settings if globals()[k] != checkpoint['settings'][k]]:
        raise UserError(f'{", ".join(changed)}: a resumed run keeps its model as it was made')
settings = {k: v for k, v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, str))}
path, world, rank = f'{out_dir}/ckpt.pt', int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))
say = functools.partial(print, flush=True) if rank == 0 else lambda text: None
found = getattr(torch.accelerator.current_accelerator(check_available=True), 'type', 'cpu')
device, kind = (found, found) if device == 'auto' else (device, device.split(':')[0])
device = f'cuda:{os.environ.get("LOCAL_RANK", device[5:] or 0)}' if kind == 'cuda' else device
with explained(f'device={device}: PyTorch finds {found} here'): torch.empty(1, device=device)
if batch_size < world: raise UserError(f'batch_size={batch_size}: {world} processes want an image each')
if kind == 'cuda': torch.cuda.set_device(device)
if world > 1: dist.init_process_group('nccl' if kind == 'cuda' else 'gloo')
sum_over_processes = dist.all_reduce if world > 1 else lambda tensor: None
if dtype == 'auto':              # on CPUs with bf16 instructions twice as fast as fp32, on others slow
    fast = (kind == 'cpu' and getattr(torch.cpu, 'get_capabilities', dict)().get('avx512_bf16') or
            kind == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False))
    dtype = 'bfloat16' if fast else 'float16' if kind == 'cuda' else 'float32'
precision = torch.autocast(kind, getattr(torch, dtype)) if dtype != 'float32' else contextlib.nullcontext()
torch.set_float32_matmul_precision('high')
torch.manual_seed(seed)

# data -------------------------------------------------------------------------------------------------------
public = dict(base='vit_b_16,gpt2', nanovlm='siglip-b-16,smollm2-135m')     # parts that are published
names = public.get(preset, preset) if init_from == 'pretrained' else init_from
cfg = VLMConfig() if {*init_from.split(',')} <= PUBLIC.keys() else PRESETS[preset]     # a file: the preset's
cfg = replace(cfg, **ChainMap(*(PUBLIC[name][1] for name in names.split(',') if name in PUBLIC)))
cfg = model.cfg if init_from == 'resume' else cfg
size = int((image_size or cfg.image_size) * (1.4 if augment else 1))         # a crop enlarges so much at most
train_set, val_set = (make_dataset(dataset, s, image_dir, val_dataset, size, seed) for s in ('train', 'val'))
show = lambda images: torch.full_like(images, 128) if blind else images

def load(items, first=0, augment=False):
    """Batches without end, each made from seed and number alone: so that runs resume and processes share."""
    transform = image_transform(model.cfg, augment)
    order = functools.lru_cache(2)(lambda epoch: torch.randperm(
        items.n_images, generator=torch.Generator().manual_seed(seed + epoch)))
    def make(n):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((seed + n) * world + rank)         # of choice of texts and augmentation
            groups = [items.about(int(order(i // items.n_images)[i % items.n_images]))[:texts_per_image]
                      for i in range(n * batch_size + rank, (n + 1) * batch_size, world)]
            return collate(sum(groups, []), model.cfg, tok, transform)
    many = 0 if kind == 'cpu' and dataset == 'shapes' else min(8, os.cpu_count())    # to draw costs little
    workers = (num_workers if num_workers >= 0 else many) if hasattr(os, 'fork') and kind != 'mps' else 0
    batches = torch.utils.data.DataLoader(
        range(first, 10 ** 9), batch_size=None, collate_fn=make, generator=torch.Generator(),
        num_workers=workers, multiprocessing_context='fork' if workers else None, pin_memory=kind == 'cuda',
        worker_init_fn=lambda _: os.setpgrp())       # a signal to our process group is not for the workers
    for images, *rest in batches:        # in channels_last convolutions are faster
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        yield show(images), *(x.to(device, non_blocking=True) for x in rest)

# model and optimizer ----------------------------------------------------------------------------------------
if init_from != 'resume':
    if os.path.exists(path) and not overwrite:
        raise UserError(f'{path} is there: --init_from=resume goes on with it, --overwrite begins anew')
    tok = Tokenizer.make(tokenizer or cfg.tokenizer, train_set.texts, vocab_size or cfg.vocab_size)
    checkpoint = dict(step=0, tokenizer=tok, settings=settings)
    vit, text = (replace(c, dropout=c.dropout if dropout < 0 else dropout) for c in (cfg.vision, cfg.text))
    own = {k: settings[k] for k in ('image_size', 'block_size', 'projection') if settings[k]}
    own['vocab_size'] = tok.n_vocab if init_from == 'scratch' else max(tok.n_vocab, cfg.vocab_size)
    cfg = replace(cfg, vision=vit, text=text, tokenizer=tok.name, **own)
    model = MinimalVLM(cfg) if init_from == 'scratch' else MinimalVLM.from_pretrained(names, cfg)
tok, settings['init_from'] = checkpoint['tokenizer'], checkpoint['settings']['init_from']
model.to(device, memory_format=torch.channels_last)
model.vision.grad_checkpointing = model.decoder.grad_checkpointing = grad_checkpointing

class Muon(torch.optim.Optimizer):
    """Momentum, each matrix's step made orthogonal (Keller Jordan 2024); a convolution is (out, all else)."""
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            ps = [p for p in group['params'] if p.grad is not None]
            means = [self.state[p].setdefault('mean', torch.zeros_like(p)).lerp_(p.grad, 0.05) for p in ps]
            updates = torch.stack([p.grad.lerp(mean, 0.95).flatten(1) for p, mean in zip(ps, means)])
            for p, update in zip(ps, orthogonal(updates)):
                p.mul_(1 - group['lr'] * group['weight_decay'])
                p.add_(update.view(p.shape), alpha=-group['lr'] * max(1, len(update) / update.size(1)) ** 0.5)

def orthogonal(x):
    """Newton-Schulz: drives all singular values of matrices x (n,rows,columns) towards 1; bf16 will do."""
    y = (x.mT if x.size(1) > x.size(2) else x).to(torch.bfloat16 if dtype == 'bfloat16' else x.dtype)
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), y, beta=3.4445)
    return (y.mT if x.size(1) > x.size(2) else y).to(x.dtype)

frozen = re.findall('vision|projection|decoder', freeze)
scales = dict(re.findall(r'(vision|projection|decoder)=(\d*\.?\d+(?:e-?\d+)?)', lr_scale))
if (','.join(frozen), ','.join(map('='.join, scales.items()))) != (freeze, lr_scale) or len({*frozen}) == 3:
    raise UserError(f'freeze={freeze}, lr_scale={lr_scale}: wanted as vision,decoder and as projection=0.1')
muon, adamw = {}, {}             # AdamW: embeddings, the first convolution, norms and biases, or everything
for name, p in model.named_parameters():
    scale = float(scales.get(part := name.split('.')[0], 1))
    hidden = p.dim() > 1 and not re.search('embedding|position|stem.[0w]|n.conv1|latents|class_token', name)
    groups, rate = (muon, muon_lr) if hidden and optimizer == 'muon' else (adamw, learning_rate)
    group = dict(params=[], full_lr=rate * scale, weight_decay=weight_decay * hidden)
    if p.requires_grad_(part not in frozen).requires_grad:
        groups.setdefault((scale, p.flatten(1).shape if hidden else ()), group)['params'].append(p)
optimizers = [Muon(muon.values(), {})] if muon else []
optimizers += [torch.optim.AdamW(adamw.values(), betas=(beta1, beta2), fused=True)] if adamw else []
scaler = torch.amp.GradScaler(kind, enabled=dtype == 'float16')
net = torch.compile(model) if compile else model
net = torch.nn.parallel.DistributedDataParallel(net) if world > 1 else net

# evaluation -------------------------------------------------------------------------------------------------
def answers(items, n):
    """The model's greedy answers to n items, always the same: (image, prompt, truth, answer) each."""
    transform, most = image_transform(model.cfg), model.cfg.longest_prompt
    chosen = torch.randperm(len(items), generator=torch.Generator().manual_seed(0))[:n].tolist()
    for i in range(0, len(chosen), batch_size):
        batch = [items[j] for j in chosen[i:i + batch_size]]
        images = show(torch.stack([transform(item[0]) for item in batch])).to(device)
        asked = [torch.tensor(encode_prompt(tok, model.cfg, q)[:most]).long().to(device) for _, q, _ in batch]
        rows = model.generate(images, asked, max_new_tokens=model.cfg.block_size, temperature=0, stop=tok.eos)
        for item, prompt, row in zip(batch, asked, rows):
            yield *item, tok.decode(row[len(prompt):].tolist()).strip()

def quiz(items, n, title):
    """Prints and returns the share of n items answered word for word, also for each way a prompt begins."""
    marks = [(' '.join(q.split()[:2]) or 'caption', said == truth) for _, q, truth, said in answers(items, n)]
    share = sum(right for _, right in marks) / max(1, len(marks))
    kinds = sorted(Counter(kind for kind, _ in marks).most_common(8))
    each = [f', {kind} {marks.count((kind, True)) / n:.1%}' for kind, n in kinds if len(kinds) > 1]
    say(f'  word for word right: {share:.1%} of {len(marks)} {title}{"".join(each)}')
    return share

def evaluate(last):
    """Loss on held-out items with their images and with others', answers, and a picture (green: right)."""
    model.eval()
    sums = torch.zeros(4)
    for _, (images, *rest) in zip(range(eval_iters), load(val_set)):
        both = [model(i, *rest, return_logits=False)[1].item() for i in (images, images.roll(1, 0))]
        scored = rest[1][rest[1] != -100].tolist()
        sums += torch.tensor([*both, 1.0, len(tok.decode(scored)) / len(scored)]) * len(scored)
    own, swap, _, chars = (sums / sums[2]).tolist()
    say(f'step {step}: held-out loss {own:.4f}, with images swapped {swap:.4f}, image gain {swap - own:.4f}, '
        f'{own / chars / math.log(2):.4f} bits a character')
    share = quiz(val_set, eval_samples, 'held-out items') if eval_samples else math.nan
    if last and eval_samples and dataset == 'shapes':
        quiz(Shapes('val', seed, 'caption'), 5 * eval_samples, 'captions')
        quiz(Shapes('novel', seed, 'caption'), 5 * eval_samples, 'captions of pairs that training never drew')
        quiz(Shapes('val', seed, 'question'), 5 * eval_samples, 'questions')
    print(f'{step},{time.time() - began:.1f},,{own:.5f},{swap:.5f},{share:.4f}', file=log)
    page = Image.new('RGB', (960, 930), 'white')
    for i, (image, prompt, truth, said) in enumerate(answers(val_set, 12)):
        x, y = i % 4 * 240 + 5, i // 4 * 310 + 5
        page.paste(image.resize((230, 230)), (x, y))
        text = '\n'.join(textwrap.wrap(f'{prompt} {said}'.strip(), 36)[:4])
        ImageDraw.Draw(page).text((x, y + 232), text, 'green' if said == truth else 'firebrick', font_size=13)
    page.save(f'{out_dir}/samples.png')

# the run ----------------------------------------------------------------------------------------------------
step, end, stop, losses, bad, flops = checkpoint['step'], lr_decay_iters or max_iters, [], [], 0, 0
generators = [torch, torch.cuda] if kind == 'cuda' else [torch]
if step:
    same = all(checkpoint['settings'][k] == settings[k] for k in ('optimizer', 'freeze', 'lr_scale'))
    for o, state in zip(optimizers, checkpoint['optimizers'] if same else []):   # else averages begin anew
        o.load_state_dict(dict(state, param_groups=o.state_dict()['param_groups']))      # at the rates of now
    scaler.load_state_dict(checkpoint['scaler'] or scaler.state_dict())
    for module, state in zip(generators, checkpoint['random']): module.set_rng_state(state)
with explained(f'out_dir={out_dir} cannot be written', OSError):
    os.makedirs(out_dir, exist_ok=True)
    log = open(f'{out_dir}/log.csv' if rank == 0 else os.devnull, 'a' if step else 'w', buffering=1)
if not step: print('step,seconds,loss,val_loss,val_loss_swapped,word_for_word', file=log)
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, lambda n, frame: stop.append(n))
each = [f'{k} {sum(p.numel() for p in part.parameters()) / 1e6:.2f}' for k, part in model.named_children()]
say(f'{preset}: {", ".join(each)} M parameters, {tok.name} tokenizer of {tok.n_vocab}; {device}, {dtype}; '
    f'{len(train_set)} items, {len(val_set)} held out; sequences up to {model.cfg.block_size} tokens')
stream, since, began = load(train_set, step * gradient_accumulation_steps, augment), time.time(), time.time()
while True:
    # 1. save and evaluate now and then and at the end; a signal to one process stops all at the same step
    halt = torch.tensor(len(stop), device=device if world > 1 else 'cpu')      # no wait for the GPU
    sum_over_processes(halt)
    last = bool(halt) or step >= max_iters or eval_only
    if rank == 0 and (last or step % eval_interval == 0 and step > checkpoint['step']):
        pause = time.time()
        if not eval_only:
            save_checkpoint(path, model, tok, step=step, settings=settings, scaler=scaler.state_dict(),
                            random=[m.get_rng_state() for m in generators],
                            optimizers=[o.state_dict() for o in optimizers])
        if not halt:
            with precision, torch.no_grad(), torch.random.fork_rng(devices=[]): evaluate(last)
        since += time.time() - pause
    if last: break
    # 2. the batches of this step, and what each weighs: as much as it has scored tokens
    batches = [next(stream) for _ in range(gradient_accumulation_steps)]
    weights = [(targets != -100).sum() for _, _, targets, *_ in batches]
    total = sum(weights)
    sum_over_processes(total)
    if not flops:                    # of this process: three times those forward, as if nothing were frozen
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(*batches[0], return_logits=False)
        flops = 3 * counter.get_total_flops() * gradient_accumulation_steps
    # 3. gradients, summed over batches, and over processes with the last one
    for name, part in model.named_children(): part.train(name not in frozen)     # frozen batch norms stay
    for batch, weight in zip(batches, weights):
        net.require_backward_grad_sync = batch is batches[-1]
        with precision: loss = net(*batch, return_logits=False, contrastive=contrastive)[1] * weight / total
        scaler.scale(loss * world).backward()
        losses.append(loss.detach())
    # 4. the rate rises straight over warmup_iters, then falls straight to min_lr at lr_decay_iters
    left = min(1.0, max(0.0, (end - step) / max(1, end - warmup_iters))) if decay_lr else 1.0
    factor = min(1.0, (step + 1) / (warmup_iters + 1)) * (min_lr + (1 - min_lr) * left)
    for o in optimizers:
        scaler.unscale_(o)
        for group in o.param_groups: group['lr'] = group['full_lr'] * factor
    # 5. clip and step, unless the gradient is not finite
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    bad = 0 if math.isfinite(norm) else bad + 1
    if bad: say(f'step {step}: the gradient is not finite, step left out')
    if bad == (5 if dtype != 'float16' else 30):     # a gradient scaler needs such steps to find its scale
        raise UserError(f'{bad} steps left out: try --dtype=float32, or lower --learning_rate and --muon_lr')
    for o in optimizers if not bad else []: scaler.step(o)
    scaler.update()
    net.zero_grad()
    step += 1
    if step % log_interval == 0:     # 6. tell
        n = len(losses) / gradient_accumulation_steps
        mean, seconds = torch.stack(losses).sum() / n, (time.time() - since) / n
        sum_over_processes(mean)
        rate, tflops = batch_size * gradient_accumulation_steps / seconds, flops / seconds / 1e12
        gpu = f', MFU {tflops / peak_tflops:.1%}, {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB'
        say(f'step {step}/{max_iters}: loss {mean:.4f}, {seconds * 1e3:.0f} ms, {rate:.0f} images/s, '
            f'{tflops:.3f} TFLOP/s{gpu * (kind == "cuda")}, {(max_iters - step) * seconds / 60:.1f} min left')
        print(f'{step},{time.time() - began:.1f},{mean:.5f},,,', file=log)
        losses, since = [], time.time()
say(f'stopped at step {step}: --init_from=resume goes on' if halt else
    f'{step} steps, {time.time() - began:.0f} s. Now: python sample.py --out_dir={out_dir}')
if world > 1: os._exit(0)        # in a plain exit a thread of gloo aborts now and then
