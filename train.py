"""
Trains the model in vlm.py on a CPU, a GPU or an Apple chip, or on several GPUs with torchrun.

    python train.py                                    from scratch on drawn scenes: minutes on a laptop
    python train.py --init_from=resume                 continues a stopped run, with its settings
    python train.py --batch_size=32 --out_dir=out-32   every setting below can be changed like this
    python train.py --preset=small --dataset=photos/captions.csv --out_dir=out-photos     your own photos
"""
import atexit, contextlib, datetime, math, os, random, re, shlex, shutil, signal, sys, textwrap, time
from collections import Counter, defaultdict
from dataclasses import replace
# oneDNN caches a kernel for every shape it meets; with its default limit the cache costs gigabytes
os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '256')
import torch, torch.distributed as dist
from torchvision.transforms import v2 as transforms
from data import CaptionedImages, Shapes, contact_sheet, find_images
from vlm import PRESETS, MinimalVLM, Tokenizer, UserError, VLMConfig, check, collate, encode_answer
from vlm import encode_prompt, image_transform, load_checkpoint, override, read_config, save_checkpoint

# settings ---------------------------------------------------------------------------------------------
out_dir = 'out'                  # folder for ckpt.pt, log.csv and samples.png
init_from = 'scratch'            # 'scratch', 'resume', a .pt, 'pretrained' or e.g. siglip-b-16,gpt2
eval_interval = 1000             # steps between evaluations; each also saves a checkpoint
log_interval = 50                # steps between log lines
eval_iters = 20                  # held-out batches for the validation loss
eval_samples = 200               # held-out items to answer (at the end, 16 times as many on shapes); 0 = none
eval_only = False                # with init_from=resume: evaluate, then exit
overwrite = False                # start a new run even if out_dir has a ckpt.pt, which becomes ckpt-old.pt
dataset = 'shapes'               # 'shapes', a caption file (.csv .tsv .txt .jsonl .json) or folder
val_dataset = ''                 # the same, for validation; '' = hold out 5% of the images
image_dir = ''                   # folder of the images; '' = that of the caption file, or its images/
val_image_dir = ''               # the same, for val_dataset; '' = image_dir
blind = False                    # train and evaluate on black images: a baseline that cannot see
augment = False                  # random flips, crops and colors; wrong if texts say left or right
num_workers = -1                 # data loading processes; 0 = none, -1 = automatic
batch_size = 16                  # images per forward pass, across all processes
texts_per_image = 10             # at most this many texts per image in a batch, chosen at random
gradient_accumulation_steps = 1  # forward passes per optimizer step
preset = 'tiny'                  # 'tiny', 'small', 'base' or 'nanovlm': see PRESETS in vlm.py
tokenizer = ''                   # 'bytes', 'bpe' (learned), a folder or repository; '' = preset's
vocab_size = 0                   # maximum vocabulary size for 'bpe', at least 257; 0 = the preset's
image_size = 0                   # pixels per side; 0 = the preset's
block_size = 0                   # tokens per sequence, the image's included; 0 = the preset's
projection = ''                  # 'linear', 'mlp', 'pixel_shuffle', 'perceiver'; '' = the preset's
dropout = -1.0                   # from 0 to below 1; -1 = the preset's
optimizer = 'muon'               # 'muon' (for hidden matrices; AdamW for the rest) or 'adamw'
learning_rate = 1.2e-3           # peak, AdamW
muon_lr = 0.012                  # peak, Muon
max_iters = 1600                 # optimizer steps
weight_decay = 0.4               # of hidden matrices only, not of embeddings
grad_clip = 1.0                  # maximum gradient norm; 0 = no clipping
freeze = ''                      # parts to freeze: vision, projection or decoder, or e.g. vision,decoder
lr_scale = ''                    # learning rate factors, e.g. vision=0.1,decoder=0.1
warmup_iters = 50                # linear warmup steps
min_lr = 0.0                     # at max_iters, as a fraction of the peak (in nanoGPT: absolute)
device = 'auto'                  # 'auto', 'cpu', 'mps', 'cuda', 'cuda:1', ...
dtype = 'auto'                   # 'auto', 'float32', 'bfloat16', 'float16' (with loss scaling)
grad_checkpointing = False       # recompute activations in backward: less memory, slower
compile = False                  # torch.compile: on a GPU faster after minutes of compiling; no gain on a CPU
seed = 1337                      # for initialization, data order, augmentation, dropout and scenes

# device -----------------------------------------------------------------------------------------------
def find_device(device, dtype):
    """Resolves the settings device and dtype -> torch.device, name of the dtype"""
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device('cpu')
    try:
        where = torch.device(device.replace('auto', str(found)))
        if where.type == 'cuda':
            torch.cuda.set_device(where.index or int(os.environ.get('LOCAL_RANK', 0)))
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f'device={device} does not work ({str(e)[:60]!r}); PyTorch found: {found}') from e
    if dtype == 'auto':
        dtype = 'float32'
        if where.type == 'cuda':
            dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
        elif where.type == 'cpu' and torch.cpu.get_capabilities().get('avx512_bf16'):
            dtype = 'bfloat16'  # twice as fast on CPUs that support it, slow on others
    check(dtype in ('float32', 'bfloat16', 'float16'), f'dtype={dtype}: unknown; see --help')
    return where, dtype

def check_compiler():
    compilers = [*(os.environ.get('CXX') or 'g++').split()[:1], 'clang++', 'cl']  # CXX='ccache g++'
    check(any(map(shutil.which, compilers)), 'compile needs a C++ compiler such as g++')

# data sets and batches --------------------------------------------------------------------------------
def make_datasets():
    """The training and validation sets. Held out: val_dataset, or 5% of the images, chosen by name."""
    if dataset == 'shapes':
        check(not val_dataset, 'val_dataset needs a --dataset of photos')
        return Shapes('train', seed), Shapes('val', seed)
    texts, folder = find_images(dataset, image_dir)
    if val_dataset:
        held_out = find_images(val_dataset, val_image_dir or image_dir)
        return CaptionedImages(texts, folder), CaptionedImages(*held_out)
    check(len(texts) > 1, f'dataset={dataset}: needs at least two images: one is held out')
    # ordered by a hash of the name, so that new images move few others; ascii(): it may not be UTF-8
    in_order = sorted(texts, key=lambda name: random.Random(ascii(name.replace(os.sep, '/'))).random())
    val_texts = {name: texts.pop(name) for name in in_order[: math.ceil(len(texts) / 20)]}
    return CaptionedImages(texts, folder), CaptionedImages(val_texts, folder)

def make_transform(cfg, augment=False):
    """image_transform, after random changes if augment; all black if blind."""
    steps = [image_transform(cfg)]
    if augment:
        crop = transforms.RandomResizedCrop((cfg.image_size, cfg.image_size), scale=(0.7, 1.0))
        steps = [transforms.RandomHorizontalFlip(), crop, transforms.ColorJitter(0.2, 0.2, 0.2), *steps]
    if blind:
        steps.append(torch.zeros_like)
    return transforms.Compose(steps)

class Batches(torch.utils.data.Dataset):
    """Batch n depends only on n, the settings and the number of processes, so resuming repeats it.
    Each process builds its own share of a batch."""
    def __init__(self, data, cfg, tokenizer, rank=0, world=1, augment=False):
        self.data, self.cfg, self.tokenizer = data, cfg, tokenizer
        self.part = slice(rank, None, world)
        self.settings = (seed, batch_size, texts_per_image)  # a spawned worker has the defaults
        self.transform = make_transform(cfg, augment)

    def __getitem__(self, n):
        seed, batch_size, texts_per_image = self.settings
        epoch, n = divmod(n, max(1, self.data.n_images // batch_size))  # no partial last batch
        order = torch.randperm(self.data.n_images, generator=torch.Generator().manual_seed(seed + epoch))
        rng = random.Random(f'{seed} {epoch} {n} {self.part}')
        torch.manual_seed(rng.randrange(2**60))  # for the augmentation
        items = []
        for i in order[n * batch_size : (n + 1) * batch_size][self.part].tolist():
            image, texts = self.data[i]
            items.append((image, rng.sample(texts, len(texts))[:texts_per_image]))  # in random order
        return collate(items, self.cfg, self.tokenizer, self.transform)

def ignore_signals(worker):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process shuts its workers down
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def load(batches, numbers, where):
    """Yields batches[n] for each n in numbers, its tensors moved to where, a torch.device."""
    workers = num_workers
    if workers < 0:  # drawing scenes takes little time next to a step, except on a fast GPU
        workers = 0 if dataset == 'shapes' and where.type != 'cuda' else min(8, os.cpu_count())
    if workers and os.path.isdir('/dev/shm'):  # holds up to three batches from each worker
        needed = 3 * workers * batch_size * (3 * batches.cfg.image_size**2)  # bytes of RGB
        free = shutil.disk_usage('/dev/shm').free
        check(free > needed, f'{workers} workers need {needed >> 20} MB in /dev/shm, but {free >> 20} MB is '
                             'free: try docker run --shm-size=1g, or --num_workers=0')
    pinned = where.type == 'cuda'  # so that copies need not block; elsewhere the source may be freed
    options = dict(num_workers=workers, worker_init_fn=ignore_signals, pin_memory=pinned)
    loader = iter(torch.utils.data.DataLoader(batches, batch_size=None, sampler=numbers, **options))
    if workers:  # these ignore SIGTERM: without this, Python's exit would wait for them forever
        atexit.register(loader._shutdown_workers)
    try:
        for batch in loader:
            yield [None if x is None else x.to(where, non_blocking=pinned) for x in batch]
        if workers:  # they exited with the last batch: the handler would keep their pipes open
            atexit.unregister(loader._shutdown_workers)
    except UserError as e:  # from a worker, the message follows a traceback
        raise UserError(str(e).split('UserError: ')[-1].strip()) from e

def report_cut_texts(groups, cfg, tokenizer):
    """Reports how many texts do not fit, each on its own. groups: for each image, [(prompt, answer), ...]"""
    room = cfg.block_size - cfg.n_visual  # tokens after the image
    endless = replace(cfg, block_size=10**9)  # does not cut prompts
    needed = []
    for prompt, answer in [text for texts in groups for text in texts]:
        n_prompt = len(encode_prompt(tokenizer, endless, prompt))
        n = n_prompt + len(encode_answer(tokenizer, cfg, answer)) - 1  # the last isn't fed in
        needed.append(max(n, 2 * n_prompt))  # encode_prompt cuts to half of the room
    cut = sum(n > room for n in needed)
    if cut:
        print(f'{cut} of {len(needed)} texts are too long and will be cut: '
              f'--block_size={cfg.n_visual + max(needed)} in a new run makes room')

# optimizers -------------------------------------------------------------------------------------------
class Muon(torch.optim.Optimizer):
    """Momentum with each update made orthogonal (Keller Jordan 2024). A convolution counts as one matrix,
    (out, all the rest). All parameters of a group have the same shape and are orthogonalized together."""
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group['params']
            grads = torch.stack([p.grad.flatten(1) for p in params])  # (n,rows,columns)
            mean = self.state[params[0]].setdefault('mean', torch.zeros_like(grads))  # of all n
            mean.lerp_(grads, 0.1)  # momentum 0.9: 0.95 is usual, but slows the small presets
            updates = orthogonalize(grads.lerp(mean, 0.9))  # Nesterov: one step ahead
            scale = math.sqrt(max(1, updates.size(1) / updates.size(2)))
            for p, update in zip(params, updates):
                p.mul_(1 - group['lr'] * group['weight_decay'])
                p.add_(update.view(p.shape), alpha=-group['lr'] * scale)

def orthogonalize(x):
    """Newton-Schulz iteration: moves all singular values of the matrices x (n,rows,columns) towards 1."""
    if x.size(1) > x.size(2):
        return orthogonalize(x.mT).mT
    y = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if dtype == 'bfloat16':  # set in main
        y = y.bfloat16()
    for _ in range(5):  # y <- 3.4445 y + (-4.775 a + 2.0315 a^2) y with a = y y^T
        a = y @ y.mT
        b = torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315)
        y = torch.baddbmm(y, b, y, beta=3.4445)
    return y.to(x.dtype)

def make_optimizers(model):
    """Freezes parts. Muon for hidden matrices; AdamW for embeddings, positions, latents, the first
    convolution, norms and biases, or for everything. Weight decay applies to hidden matrices only."""
    parts = ['vision', 'projection', 'decoder']
    frozen = re.findall(r'\w+', freeze)
    check(set(frozen) < set(parts), f'freeze={freeze}: expected one or two of {", ".join(parts)}')
    scales = dict(re.findall(r'(\w+)=(\d*\.?\d+(?:e-?\d+)?)', lr_scale))
    complete = ','.join(map('='.join, scales.items())) == lr_scale.replace(' ', '')  # findall skips
    check(complete and set(scales) <= set(parts), f'lr_scale={lr_scale}: expected e.g. vision=0.1')
    check(optimizer in ('muon', 'adamw'), f'optimizer={optimizer} must be muon or adamw')
    groups = defaultdict(list)  # by (matrix shape for Muon or None, rate factor, has weight decay)
    for name, p in model.named_parameters():
        part = name.split('.')[0]
        p.requires_grad_(part not in frozen)
        hidden = p.dim() > 1 and not re.search(r'embedding|latents|stem\.(0\.)?weight|layers\.0\.', name)
        shape = p.flatten(1).shape if hidden and optimizer == 'muon' else None
        if p.requires_grad:
            groups[shape, float(scales.get(part, 1)), hidden].append(p)
    muon, adamw = [], []
    for (shape, scale, hidden), params in groups.items():
        rate = scale * (muon_lr if shape else learning_rate)
        group = dict(params=params, full_lr=rate, weight_decay=weight_decay if hidden else 0.0)
        (muon if shape else adamw).append(group)
    optimizers = [Muon(muon, {})] if muon else []  # {}: no defaults; train_step sets each group's lr
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, betas=(0.9, 0.95), fused=True))
    return optimizers

def rate_factor(step):
    """Linear warmup, then linear decay to min_lr at max_iters."""
    left = min(1, (max_iters - step) / max(1, max_iters - warmup_iters))  # from 1 after warmup to 0
    return min(1, (step + 1) / (warmup_iters + 1)) * (min_lr + (1 - min_lr) * left)

# evaluation -------------------------------------------------------------------------------------------
def choose_items(data, n, kind=''):
    """Up to n fixed held-out items (image, [(prompt, truth)]). kind: 'caption', 'question' or '' (any)."""
    items = []
    for i in random.Random(1337).sample(range(data.n_images), min(n, data.n_images)):
        image, texts = data[i]
        texts = [(q, a) for q, a in texts if not kind or (kind == 'question') == bool(q)]
        if texts:
            items.append((image, [texts[len(items) % len(texts)]]))  # its 1st, 2nd, ... in turn
    return items

def exact_answers(model, tok, items, title):
    """Prints and returns the share of items that greedy generation answers word for word. One forward pass
    suffices: greedy text equals the truth if each token is the likeliest after the true ones."""
    where = model.decoder.embedding.weight.device
    asked, exact = Counter(), Counter()  # by kind of text
    for i in range(0, len(items), 64):  # many at a time: without gradients, they take little memory
        batch = items[i : i + 64]
        images, ids, targets, _ = collate(batch, model.cfg, tok, make_transform(model.cfg))
        logits, _ = model(images.to(where), ids.to(where), targets.to(where))
        likeliest = targets.clone()  # unscored positions count as right
        likeliest[targets != -100] = logits.argmax(dim=-1).cpu()  # the logits of the others
        right = (likeliest == targets).all(dim=1) & (targets == tok.end).any(dim=1)  # and not cut
        for (_, [(prompt, _)]), is_right in zip(batch, right.tolist()):
            kind = ' '.join(prompt.split()[:2]) or 'caption'
            asked[kind] += 1
            exact[kind] += is_right
    share = exact.total() / len(items)
    each = sorted(f'{kind} {exact[kind] / n:.1%}' for kind, n in asked.most_common(8))
    details = f' ({", ".join(each)})' if len(each) > 1 else ''
    print(f'exact answers: {share:.1%} of {len(items)} {title}{details}')
    return share

def draw_samples(model, tok, items, path):
    """A contact sheet: below each image its question, if any, and the answer, green where it is exact."""
    where = model.decoder.embedding.weight.device
    tiles = []
    for image, [(prompt, truth)] in items:
        pixels = make_transform(model.cfg)(image)[None].to(where)
        ids = torch.tensor([encode_prompt(tok, model.cfg, prompt)], device=where)
        row = model.generate(pixels, ids, 150, temperature=0, stop=tok.end)[0]  # a tile shows less
        said = tok.decode(row[ids.size(1) :].tolist()).strip()
        color = 'green' if said == truth.strip() else 'firebrick'
        lines = [(line, 'black') for line in textwrap.wrap(prompt, 25)[:4]]
        lines += [(line, color) for line in textwrap.wrap(said, 25)]
        tiles.append((image, lines[:6]))
    contact_sheet(tiles, path, columns=3, width=320)

@torch.no_grad()
def evaluate(model, batches, step, last, where):
    """Prints losses and exact answers on held-out data -> the numbers for log.csv"""
    model.eval()
    data, tok = batches.data, batches.tokenizer
    own = swapped = count = 0
    for images, ids, targets, positions in load(batches, range(eval_iters), where):
        n = (targets != -100).sum().item()
        own += n * model(images, ids, targets, positions)[1].item()
        # swapped: each text with the image of its neighbor in the batch
        swapped += n * model(images.roll(1, 0), ids, targets, positions)[1].item()
        count += n
    own, swapped, share = own / count, swapped / count, math.nan
    gain = f'with images swapped {swapped:.4f}, image gain {swapped - own:.4f}'
    if len(images) == 1:  # in each batch: a text is its own neighbor
        swapped = math.nan
        gain = 'image gain unknown: it needs two held-out images in a batch'
    print(f'step {step}: held-out loss {own:.4f}, {gain}')
    if eval_samples:
        share = exact_answers(model, tok, choose_items(data, eval_samples), 'held-out items')
    if eval_samples and last and dataset == 'shapes':
        n = 5 * eval_samples  # for each of three kinds of items
        exact_answers(model, tok, choose_items(data, n, 'caption'), 'captions')
        items = choose_items(Shapes('novel', seed), n, 'caption')
        exact_answers(model, tok, items, 'captions with unseen pairs')
        exact_answers(model, tok, choose_items(data, n, 'question'), 'questions')
    return own, swapped, share

# the run ----------------------------------------------------------------------------------------------
def make_model(texts):
    """The model and tokenizer of a new run, from the settings. texts: what a new BPE is learned from."""
    if init_from.endswith('.pt'):
        changed = [tokenizer, vocab_size, image_size, block_size, projection, dropout >= 0, preset != 'tiny']
        check(not any(changed), f'{init_from} fixes preset, tokenizer, sizes, projection, dropout: omit them')
        return load_checkpoint(os.path.expanduser(init_from))[:2]
    names = init_from
    if init_from == 'pretrained':
        names = dict(base='siglip-b-16,gpt2', nanovlm='siglip-b-16,smollm2-135m').get(preset)
        check(names, 'init_from=pretrained needs --preset=base or nanovlm')
    published = {}
    for name in [part.strip() for part in names.split(',') if names != 'scratch']:
        config = read_config(name)
        if 'text' in config and os.path.isfile(os.path.expanduser(f'{name}/tokenizer.json')):
            config['tokenizer'] = name  # the folder's own, not the repository that its config names
        published |= config
    cfg = vars(PRESETS[preset]) | published
    tok = Tokenizer.make(tokenizer or cfg['tokenizer'], texts, vocab_size or cfg['vocab_size'])
    if 'text' not in published:  # a new decoder: as many ids as the tokenizer has
        cfg['vocab_size'] = tok.vocab_size
    elif tok.name in ('bytes', 'bpe') or tok.vocab_size > cfg['vocab_size']:  # the decoder learned other ids
        raise UserError(f'tokenizer={tok.name} does not fit the decoder')
    chosen = dict(image_size=image_size, block_size=block_size, projection=projection)
    cfg |= {name: value for name, value in chosen.items() if value}
    if dropout >= 0:
        cfg |= {part: replace(cfg[part], dropout=dropout) for part in ('vision', 'text')}
    cfg = VLMConfig(**cfg | dict(tokenizer=tok.name))
    if not published:
        return MinimalVLM(cfg), tok
    try:
        return MinimalVLM.from_pretrained(names, cfg), tok
    except OSError as e:  # from torchvision, which downloads a ResNet's weights
        raise UserError(f'{names}: {e}; put the weights into {torch.hub.get_dir()}/checkpoints') from e

def read_settings(argv):
    """Sets the globals -> the settings, and the model, tokenizer and checkpoint of the run to resume."""
    settings = override(globals(), argv)
    check(preset in PRESETS, f'preset={preset} must be one of {", ".join(PRESETS)}')
    positive = 'eval_interval log_interval eval_iters batch_size texts_per_image gradient_accumulation_steps'
    least = dict.fromkeys(positive.split(), 1) | dict(eval_samples=0, warmup_iters=0, grad_clip=0)
    for name, low in least.items():
        check(settings[name] >= low, f'{name}={settings[name]} must be at least {low}')
    check(not eval_only or init_from == 'resume', 'eval_only needs init_from=resume')
    path = os.path.expanduser(f'{out_dir}/ckpt.pt')
    if init_from != 'resume':
        allowed = overwrite or not os.path.exists(path)
        check(allowed, f'{path} exists: --init_from=resume continues, --overwrite replaces it')
        return settings, None, None, {}
    model, tok, checkpoint = load_checkpoint(path)
    check('settings' in checkpoint, f'{path} was not written by train.py: it cannot be resumed')
    for name, value in checkpoint['settings'].items():  # unless removed or of another type now
        if name in {*settings} - {'out_dir', 'init_from'} and type(value) is type(settings[name]):
            globals()[name] = value
    before = dict(globals())  # a copy: override changes the globals
    settings = override(globals(), argv)  # again, on top of the saved ones
    fixed = 'preset tokenizer vocab_size image_size block_size projection dropout optimizer freeze lr_scale'
    for name in [name for name in settings if settings[name] != before[name]]:
        check(name not in fixed.split(), f'{name}={settings[name]} cannot change when resuming')
        print(f'{name}: {before[name]} -> {settings[name]}')
    print(f'{path}: {checkpoint["step"]} of {max_iters} steps are done')
    return settings, model, tok, checkpoint

def catch_signals():
    """-> a list to which SIGINT and SIGTERM are added. The same one again kills the process at once."""
    stopped = []
    def stop(number, frame):
        stopped.append(number)
        signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # Ctrl-C also ends the tee in `2>&1 | tee log.txt`
            os.write(2, b'stopping after this step; a second signal stops at once\n')  # print could fail here
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    return stopped

def train_step(model, net, optimizers, scaler, autocast, batches, step):
    """One optimizer step on the mean gradient of the batches -> their mean loss, and whether it was made: if
    the gradient is not finite, the model stays as it was. net: the model, perhaps compiled and in DDP."""
    buffers = [buffer.clone() for buffer in model.buffers()]  # batch norm statistics
    model.train()
    for part in re.findall(r'\w+', freeze):
        model.get_submodule(part).eval()  # no dropout, and batch norm statistics stay fixed
    total = 0
    for n, batch in enumerate(batches, 1):
        net.require_backward_grad_sync = n == len(batches)  # DDP: on the last batch only
        with autocast:
            loss = net(*batch)[1] / len(batches)
        scaler.scale(loss).backward()
        total += loss.detach()
    for o in optimizers:
        scaler.unscale_(o)
        for group in o.param_groups:
            group['lr'] = group['full_lr'] * rate_factor(step)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    finite = torch.isfinite(norm).item()
    if finite:
        for o in optimizers:
            scaler.step(o)
    else:
        for buffer, saved in zip(model.buffers(), buffers):
            buffer.copy_(saved)
        print(f'step {step + 1}: the gradient is not finite, so the step is skipped')
    scaler.update()
    model.zero_grad()
    return total, finite

def main(argv=None):
    global dtype  # orthogonalize reads it
    # 1. settings; torchrun sets RANK and WORLD_SIZE
    rank = int(os.environ.get('RANK', 0))
    world = int(os.environ.get('WORLD_SIZE', 1))
    if rank > 0:  # only rank 0 prints (but each reports errors to stderr)
        sys.stdout = open(os.devnull, 'w')
    settings, model, tok, checkpoint = read_settings(argv)
    folder = os.path.expanduser(out_dir)
    step = first_step = checkpoint.get('step', 0)  # steps done so far, with those that were skipped
    check(not augment or dataset != 'shapes', 'augment makes the texts of shapes wrong: leave it out')
    os.makedirs(folder, exist_ok=True)

    # 2. device and precision
    where, dtype = find_device(device, dtype)
    if world > 1:
        dist.init_process_group(timeout=datetime.timedelta(hours=2))  # time for rank 0 to evaluate
        atexit.register(dist.destroy_process_group)  # or its threads may abort the process at exit
    autocast = torch.autocast(where.type, getattr(torch, dtype), enabled=dtype != 'float32')
    scaler = torch.amp.GradScaler(where.type, enabled=dtype == 'float16')
    torch.set_float32_matmul_precision('high')
    torch.manual_seed(seed)

    # 3. data and model
    train_set, val_set = make_datasets()
    n_images = min(batch_size, train_set.n_images)  # in a batch
    check(n_images >= world, f'{n_images} images per batch: each of the {world} processes needs at least one')
    all_texts = train_set.texts if dataset != 'shapes' else [train_set[i][1] for i in range(400)]
    if init_from != 'resume':
        model, tok = make_model([' '.join(pair) for texts in all_texts for pair in texts])
    report_cut_texts(all_texts[:5000], model.cfg, tok)  # more would take minutes
    train_set.min_size = val_set.min_size = int(1.4 * model.cfg.image_size)  # of photos: room for crops
    model.to(where, memory_format=torch.channels_last)  # convolutions are faster in this format
    for module in model.modules():
        module.grad_checkpointing = grad_checkpointing  # each Transformer reads its own

    # 4. optimizers and batches; a resumed run restores their state, but takes rates from its settings
    optimizers = make_optimizers(model)
    for o, state in zip(optimizers, checkpoint.pop('optimizers', [])):
        o.load_state_dict(state | dict(param_groups=o.state_dict()['param_groups']))
    scaler.load_state_dict(checkpoint.get('scaler') or scaler.state_dict())  # {} unless float16
    net = model
    if compile:
        check_compiler()
        net = torch.compile(net)
    if world > 1:
        net = torch.nn.parallel.DistributedDataParallel(net)
    val_batches = Batches(val_set, model.cfg, tok)
    batches = Batches(train_set, model.cfg, tok, rank, world, augment)
    stream = load(batches, range(step * gradient_accumulation_steps, 10**9), where)  # endless

    # 5. the log; a signal stops the run after its step
    log_path = f'{folder}/log.csv' if rank == 0 and not eval_only else os.devnull
    rows = []
    if step and os.path.exists(log_path):  # keep rows up to the last save; the header's step is 0
        with open(log_path, encoding='utf-8', errors='replace') as f:
            rows = [row.rstrip() + '\n' for row in f if int(re.match(r'\d*', row)[0] or 0) <= step]
    if rank == 0 and init_from != 'resume' and os.path.exists(f'{folder}/ckpt.pt'):  # overwrite allows it
        os.replace(f'{folder}/ckpt.pt', f'{folder}/ckpt-old.pt')  # or resume would continue the old run
    log = open(log_path, 'w', buffering=1)
    log.writelines(rows or ['step,seconds,loss,val_loss,val_loss_swapped,exact\n'])
    stopped = catch_signals()
    size = sum(map(torch.numel, model.parameters()))
    print(f'{size / 1e6:.2f}M parameters, {tok.vocab_size} tokens, {where}, {dtype}')
    losses, skipped = [], 0  # since the last log line; steps skipped in a row
    since = time.time()  # start of a log interval
    began = since - checkpoint.get('seconds', 0)  # of the whole run
    while True:
        # 6. save and evaluate, periodically and at the end; a signal to one process stops all
        halt = torch.tensor(len(stopped), device=where)
        if world > 1:
            dist.all_reduce(halt)
        last = bool(halt) or step >= max_iters or eval_only or skipped == 20
        due = step % eval_interval == 0 and step > first_step
        if rank == 0 and (last or due):
            pause = time.time()
            if not eval_only:
                state = dict(step=step, seconds=time.time() - began, settings=settings)
                state |= dict(scaler=scaler.state_dict(), optimizers=[o.state_dict() for o in optimizers])
                try:
                    save_checkpoint(f'{folder}/ckpt.pt', model, tok, **state)
                except UserError as e:  # perhaps a full disk: the next save may succeed
                    check(not last, str(e))  # raises, if this was the last
                    print(f'step {step}: {e}', file=sys.stderr)  # stdout may be a closed pipe
            if not halt:
                try:
                    with autocast:
                        own, swapped, share = evaluate(model, val_batches, step, last, where)
                        log.write(f'{step},{time.time() - began:.1f},,{own:.5f},{swapped:.5f},{share:.4f}\n')
                        shown = Shapes('val', seed, pixels=624) if dataset == 'shapes' else val_set  # sharper
                        draw_samples(model, tok, choose_items(shown, 6), f'{folder}/samples.png')
                except (UserError, OSError) as e:  # no readable image, a full disk
                    check(not eval_only, str(e))
                    print(f'step {step}: the evaluation failed: {e}', file=sys.stderr)
            since += time.time() - pause  # this was not training time
        if last:
            break

        # 7. one optimizer step
        step_batches = [next(stream) for _ in range(gradient_accumulation_steps)]
        torch.manual_seed((seed + step) * world + rank)  # for dropout: a resumed run draws the same
        loss, made = train_step(model, net, optimizers, scaler, autocast, step_batches, step)
        losses.append(loss)
        skipped = 0 if made else skipped + 1
        step += 1

        # 8. log; the loss is rank 0's
        if step % log_interval == 0:
            loss = sum(losses).item() / len(losses)
            seconds = (time.time() - since) / len(losses)
            rate = n_images * gradient_accumulation_steps / seconds
            with contextlib.suppress(OSError):  # a full disk or a closed pipe must not end the run
                print(f'{step},{time.time() - began:.1f},{loss:.5f},,,', file=log)
                print(f'step {step}/{max_iters}: loss {loss:.4f}, {seconds * 1000:.0f} ms, '
                      f'{rate:.0f} images/s, {(max_iters - step) * seconds / 60:.1f} min left', flush=True)
            losses, since = [], time.time()
    check(skipped < 20, '20 steps in a row were skipped: resume with --dtype=float32 or lower learning rates')
    if halt:
        print(f'stopped at step {step}: continue with --init_from=resume --out_dir={shlex.quote(out_dir)}')
    else:
        command = ['python', 'sample.py', f'--out_dir={out_dir}']
        if dataset != 'shapes':
            command.append(f'--image={os.path.join(val_set.folder, val_set.names[0])}')
            command += [f'--prompt={prompt}' for prompt, _ in val_set.texts[0][:1] if prompt]
        print(f'{step} steps, {time.time() - began:.0f} s. Next: {shlex.join(command)}')

if __name__ == '__main__':
    sys.stdout.reconfigure(errors='replace')  # for texts and names a terminal cannot show
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop, Ctrl-C ends the run at once
    try:
        main()
    except RuntimeError as e:
        if 'out of memory' in str(e):  # Apple's GPUs have no torch.OutOfMemoryError
            sys.exit('train.py: out of GPU memory: see Troubleshooting in README.md')
        if 'DataLoader worker (pid' not in str(e):  # from a signal handler, so raised anywhere
            raise
        sys.exit('train.py: a data loading process died, perhaps out of memory: try --num_workers=0')
    except (UserError, OSError) as e:
        if int(os.environ.get('RANK', 0)) > 0:  # if rank 0 fails, too, its message is enough
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun then ends this one silently
            time.sleep(5)
        sys.exit(f'train.py: {e}')
