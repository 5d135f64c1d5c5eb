"""
Trains the model of vlm.py on a CPU, a GPU, an Apple chip, or on several GPUs with torchrun.

    python train.py                                    from scratch on drawn scenes: minutes on a laptop
    python train.py --init_from=resume                 goes on after a stop, with that run's settings
    python train.py --batch_size=32 --out_dir=out-32   every setting below can be changed like this
    python train.py --preset=small --dataset=photos/captions.csv --out_dir=out-photos     your own photos
"""
import collections, csv, datetime, json, math, os, random, re, signal, sys, textwrap, time
from dataclasses import replace
os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '256')  # by default, a CPU's kernels fill gigabytes
import torch, torch.distributed as dist
from PIL import Image, ImageDraw
from torchvision.transforms import v2 as transforms
from sample import find_device, is_picture
from vlm import (PRESETS, MinimalVLM, Tokenizer, UserError, VLMConfig, check, collate, encode_prompt,
                 image_transform, load_checkpoint, open_image, override, read_config, save_checkpoint)

# settings ---------------------------------------------------------------------------------------------
out_dir = 'out'                  # folder for ckpt.pt, log.csv and samples.png
init_from = 'scratch'            # 'scratch', 'resume', a checkpoint, 'pretrained' or public names
eval_interval = 1000             # steps between evaluations, each of which also saves
log_interval = 50                # steps between lines of the log
eval_iters = 20                  # held-out batches for the validation loss
eval_samples = 200               # held-out items to answer in words; 0 = none
eval_only = False                # with init_from=resume: evaluate and stop
overwrite = False                # a new run may replace the checkpoint in out_dir
dataset = 'shapes'               # 'shapes', a caption file (.csv .txt .jsonl .json) or class folders
val_dataset = ''                 # the same for validation; '' = a fixed 5 % of the images of dataset
image_dir = ''                   # where the images of a caption file are; '' = beside it, or in images/
blind = False                    # all images black: what another run does better, it does by looking
augment = False                  # random mirrors, crops and colors; not for texts that say left
num_workers = -1                 # processes that make batches; 0 = this one, -1 = as many as help
batch_size = 16                  # images per batch, over all processes
texts_per_image = 10             # at most so many texts of an image share its row
gradient_accumulation_steps = 1  # batches per step
preset = 'tiny'                  # 'tiny', 'small', 'base' or 'nanovlm': see PRESETS in vlm.py
tokenizer = ''                   # 'bytes', 'bpe' (learned), a folder or repository; '' = the preset's
vocab_size = 0                   # at most so many tokens for 'bpe' to learn; 0 = the preset's
image_size = 0                   # pixels per side; 0 = the preset's
block_size = 0                   # tokens per sequence, the image's included; 0 = the preset's
projection = ''                  # 'linear', 'mlp', 'pixel_shuffle', 'perceiver'; '' = the preset's
dropout = -1.0                   # from 0 to below 1; -1 = the preset's
optimizer = 'muon'               # 'muon' (hidden matrices; AdamW for the rest) or 'adamw'
learning_rate = 2.5e-3           # of AdamW
muon_lr = 0.015                  # of Muon
max_iters = 1500                 # steps
weight_decay = 0.4               # of matrices; the rest has none
grad_clip = 1.0                  # maximum norm of the gradient; 0 = no clipping
freeze = ''                      # parts that do not learn, such as vision,decoder
lr_scale = ''                    # factors on the rates of parts, such as vision=0.1,decoder=0.1
warmup_iters = 50                # steps in which the rate rises
lr_decay_iters = 0               # step at which it has fallen to min_lr; 0 = max_iters
min_lr = 0.0                     # as a fraction of the full rate; 1 = no decay
device = 'auto'                  # 'auto', 'cpu', 'mps', 'cuda', 'cuda:1', ...
dtype = 'auto'                   # 'auto', 'float32', 'bfloat16' or 'float16' (with a gradient scaler)
grad_checkpointing = False       # recompute activations in the backward pass: less memory, slower
compile = False                  # torch.compile: faster on a GPU after a minute, no gain on a CPU
seed = 1337                      # of weights, order of the data and scenes

# drawn scenes: item i of a data set is (image, [(prompt, answer), ...]) -------------------------------
COLORS = {'red': (225, 40, 40), 'green': (40, 170, 70), 'blue': (40, 80, 225), 'yellow': (240, 215, 40),
          'orange': (245, 135, 25), 'purple': (145, 55, 190), 'cyan': (60, 205, 225), 'black': (35, 35, 35)}

def ring(n, turn, *radii):
    """n corners around a center: (angle clockwise from the top, distance), distances taking turns."""
    return [(math.radians(turn + 360 * i / n), radii[i % len(radii)]) for i in range(n)]

SHAPES = {'circle': ring(36, 0, 1), 'square': ring(4, 45, 1.25), 'triangle': ring(3, 0, 1),
          'diamond': ring(4, 0, 1.1, 0.7), 'star': ring(10, 0, 1.05, 0.42),
          'cross': sorted(ring(4, -17, 1.05) + ring(4, 17, 1.05) + ring(4, 45, 0.42))}
SIZES = {'small': (0.105, 0.12), 'large': (0.16, 0.18)}  # radius, in picture widths
PLACES = ('at the top left, at the top, at the top right, on the left, in the center, on the right, '
          'at the bottom left, at the bottom, at the bottom right').split(', ')
NUMBERS = ['zero', 'one', 'two', 'three']
PAIRS = [(color, shape) for color in COLORS for shape in SHAPES]
UNSEEN = list(zip(COLORS, SHAPES))  # six pairs, a red circle and so on, that training never shows
Thing = collections.namedtuple('Thing', 'color shape size place x y r')  # x, y, r in picture widths

class Shapes:
    """Scenes of one to three things, with a caption and questions. Scene i depends on seed, split and i
    alone. No UNSEEN pair is drawn or named in 'train' and 'val'; 'novel' has no others."""
    n_images = 100_000

    def __init__(self, split, seed=0, pixels=128):
        self.split, self.seed, self.pixels = split, seed, pixels
        self.pairs = [pair for pair in PAIRS if (pair in UNSEEN) == (split == 'novel')]

    @property
    def texts(self):
        """Texts for a tokenizer to learn from."""
        return [self[i][1] for i in range(400)]

    def __getitem__(self, i):
        rng = random.Random(f'{self.seed} {self.split} {i}')
        scene = self.make_scene(rng)
        asked = [question(scene, rng, self.pairs) for question in QUESTIONS]
        return self.draw(scene, rng), [('', caption(scene)), *filter(None, asked)]

    def make_scene(self, rng):
        """One to three things that do not touch, in reading order."""
        while True:
            scene = []
            for place in sorted(rng.sample(range(9), rng.choice([1, 2, 2, 3, 3, 3]))):
                pairs = self.pairs
                if scene and rng.random() < 0.3:  # of the color or the shape of the last one
                    pairs = [p for p in pairs if p[0] == scene[-1].color or p[1] == scene[-1].shape]
                color, shape = rng.choice(pairs)
                size = rng.choice(list(SIZES))
                x = 0.21 + 0.29 * (place % 3) + rng.uniform(-0.04, 0.04)
                y = 0.21 + 0.29 * (place // 3) + rng.uniform(-0.04, 0.04)
                scene.append(Thing(color, shape, size, place, x, y, rng.uniform(*SIZES[size])))
            others = [(t, u) for t in scene for u in scene if t is not u]
            if all(math.hypot(t.x - u.x, t.y - u.y) > t.r + u.r + 0.01 for t, u in others):
                return scene

    def draw(self, scene, rng):
        P = self.pixels
        image = Image.new('RGB', (P, P), tuple(rng.randint(225, 255) for _ in range(3)))
        for t in scene:
            shade = [min(255, max(0, value + rng.randint(-30, 30))) for value in COLORS[t.color]]
            x, y, r = P * t.x, P * t.y, P * t.r
            corners = [(x + r * d * math.sin(a), y - r * d * math.cos(a)) for a, d in SHAPES[t.shape]]
            ImageDraw.Draw(image).polygon(corners, tuple(shade))
        return image

def caption(scene):
    things = [f'{PLACES[t.place]} a {t.size} {t.color} {t.shape}' for t in scene]
    return ' and '.join(filter(None, [', '.join(things[:-1]), things[-1]]))

# every kind of question takes a scene and returns (question, answer), or None where it does not apply
def ask_count(scene, rng, pairs):
    traits = [trait for t in scene for trait in (t.color, t.shape)]
    twice = [trait for trait in traits if traits.count(trait) > 1]
    trait = rng.choice(['', *traits[:2], rng.choice(list(COLORS)), rng.choice(list(SHAPES))])
    if twice and rng.random() < 0.4:
        trait = rng.choice(twice)
    if trait == '':
        return 'how many objects are there?', NUMBERS[len(scene)]
    kind = 'color' if trait in COLORS else 'shape'
    return f'how many objects have the {kind} {trait}?', NUMBERS[traits.count(trait)]

def ask_color(scene, rng, pairs):
    t = rng.choice(scene)
    if [u.shape for u in scene].count(t.shape) == 1:
        return f'what color is the {t.shape}?', t.color

def ask_color_choice(scene, rng, pairs):
    t = rng.choice(scene)
    if [u.shape for u in scene].count(t.shape) == 1:
        here = [u.color for u in scene]
        wrong = rng.sample([color for color in COLORS if color != t.color], 7)
        wrong.sort(key=lambda color: color not in here)  # first those in the picture
        options = rng.sample([t.color, *wrong[:2]], 3)
        return 'what color is the {}: {}, {} or {}?'.format(t.shape, *options), t.color

def ask_shape(scene, rng, pairs):
    t = rng.choice(scene)
    return f'what shape is {PLACES[t.place]}?', t.shape

def ask_existence(scene, rng, pairs):
    t = rng.choice(scene)
    here = [(u.color, u.shape) for u in scene]
    absent = [p for p in pairs if p not in here and (p[0] == t.color or p[1] == t.shape)]
    if absent:
        pair, answer = rng.choice([((t.color, t.shape), 'yes'), (rng.choice(absent), 'no')])
        return f'is there {"an" if pair[0] == "orange" else "a"} {" ".join(pair)}?', answer

def ask_side(scene, rng, pairs):
    apart = [(t, u) for t in scene for u in scene if t.place % 3 != u.place % 3]
    if apart and len({t.shape for t in scene}) == len(scene):
        t, u = rng.choice(apart)
        return f'is the {t.shape} left or right of the {u.shape}?', 'left' if t.x < u.x else 'right'

QUESTIONS = 3 * [ask_side] + 2 * [ask_existence, ask_shape, ask_color] + [ask_count, ask_color_choice]

# photos with captions ---------------------------------------------------------------------------------
def read_captions(path):
    """Yields (image name, prompt, answer) for every row of a caption file or a folder of class folders."""
    if os.path.isdir(path):
        for folder, _, names in sorted(os.walk(path, followlinks=True)):
            label = os.path.basename(folder).replace('_', ' ')
            for name in sorted(filter(is_picture, names)):
                yield os.path.relpath(os.path.join(folder, name), path), 'what is this?', label
        return
    try:
        with open(path, encoding='utf-8-sig', newline='') as f:
            if path.endswith('.jsonl'):
                rows = [json.loads(line) for line in f if line.strip()]
            elif path.endswith('.json'):
                rows = flatten_json(json.load(f))
            else:
                rows = list(csv.DictReader(f))
    except (OSError, ValueError, LookupError, TypeError, csv.Error) as e:
        raise UserError(f'dataset={path}: not shapes, a folder or a caption file ({e!r})') from e
    for n, row in enumerate(rows, 1):
        answer = row.get('caption', row.get('answer'))
        complete = row.get('image') and answer not in (None, '') and None not in row
        check(complete, f'{path}, row {n}: needs image and caption, or image, prompt and answer')
        yield row['image'], str(row.get('prompt') or ''), str(answer)

def flatten_json(data):
    """Rows of COCO's captions, or of LLaVA's conversations: an item is an answer, with the turn before it."""
    if isinstance(data, dict):
        names = {image['id']: image['file_name'] for image in data['images']}
        return [dict(a, image=names.get(a['image_id'])) for a in data['annotations']]
    rows = []
    for talk in data:
        for question, answer in zip(talk['conversations'], talk['conversations'][1:]):
            if answer['from'] == 'gpt' and 'image' in talk:
                prompt = question['value'].replace('<image>', '').strip()
                rows.append(dict(image=talk['image'], prompt=prompt, answer=answer['value']))
    return rows

class CaptionedImages:
    """Photos with their texts. One that cannot be read is reported once, and the next one stands in."""
    size = 0  # pixels per side that are needed

    def __init__(self, texts, folder):
        self.names, self.texts = list(texts), list(texts.values())
        self.folder, self.n_images, self.unreadable = folder, len(texts), set()

    def __getitem__(self, i):
        for i in [*range(i, self.n_images), *range(i)]:
            if i not in self.unreadable:
                try:
                    return open_image(f'{self.folder}/{self.names[i]}', self.size), self.texts[i]
                except UserError as e:
                    self.unreadable.add(i)
                    print(f'skipped: {e}', file=sys.stderr)
        raise UserError(f'none of the {self.n_images} images in {self.folder} can be read')

def find_images(path):
    """-> {image name: [(prompt, answer), ...]} for the images that exist, and their folder"""
    path = os.path.expanduser(path)
    texts = collections.defaultdict(list)
    for image, prompt, answer in read_captions(path):
        texts[image].append((prompt, answer))
    folder = os.path.expanduser(image_dir) or path
    if os.path.isfile(folder):
        folder = os.path.dirname(folder) or '.'
    for name in ('images', 'Images'):
        if os.path.isdir(f'{folder}/{name}'):
            folder = f'{folder}/{name}'
    lost = [name for name in texts if not os.path.isfile(f'{folder}/{name}')]
    check(len(lost) < len(texts), f'{path}: no image in {folder} ({lost[:1]}): see --image_dir')
    if lost:
        print(f'{len(lost)} of {len(texts)} images are missing, such as {lost[0]}', file=sys.stderr)
    for name in lost:
        del texts[name]
    return texts, folder

def make_datasets():
    """The data sets for training and for validation, which gets 5 % of the images, always the same ones."""
    if dataset == 'shapes':
        return Shapes('train', seed), Shapes('val', seed)
    texts, folder = find_images(dataset)
    if val_dataset:
        return CaptionedImages(texts, folder), CaptionedImages(*find_images(val_dataset))
    check(len(texts) > 1, f'dataset={dataset}: with one image, none can be held out')
    held_out = random.Random(1337).sample(sorted(texts), math.ceil(len(texts) / 20))
    val_texts = {name: texts.pop(name) for name in held_out}
    return CaptionedImages(texts, folder), CaptionedImages(val_texts, folder)

# batches ----------------------------------------------------------------------------------------------
def make_transform(cfg, augment=False):
    """image_transform, after random changes if augment; if blind, everything is black"""
    steps = [image_transform(cfg)]
    if augment:
        crop = transforms.RandomResizedCrop((cfg.image_size, cfg.image_size), scale=(0.7, 1.0))
        steps = [transforms.RandomHorizontalFlip(), crop, transforms.ColorJitter(0.2, 0.2, 0.2)] + steps
    if blind:
        steps.append(transforms.ColorJitter(brightness=(0, 0)))
    return transforms.Compose(steps)

class Batches(torch.utils.data.Dataset):
    """Batch n is made from seed and n alone, so that a resumed run gets the batches it would have had. Each
    of world processes makes its own part of it, by its rank."""
    def __init__(self, data, cfg, tokenizer, rank=0, world=1, augment=False):
        self.data = data
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.part = slice(rank, None, world)
        self.seed, self.batch_size, self.texts_per_image = seed, batch_size, texts_per_image  # for workers
        self.transform = make_transform(cfg, augment)

    def __getitem__(self, n):
        epoch, n = divmod(n, max(1, self.data.n_images // self.batch_size))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(self.data.n_images, generator=generator)
        mine = order[n * self.batch_size : (n + 1) * self.batch_size][self.part]
        rng = random.Random(f'{self.seed} {epoch} {n} {self.part}')
        torch.manual_seed(rng.randrange(2**60))  # for the augmentation
        items = []
        try:
            for image, texts in map(self.data.__getitem__, mine.tolist()):
                items.append((image, rng.sample(texts, len(texts))[: self.texts_per_image]))
            return collate(items, self.cfg, self.tokenizer, self.transform)
        except UserError as e:
            return e  # raised in a worker process, it would not be one line

def leave_process_group(worker):
    os.setpgrp()  # a signal to the whole group must not end the workers before the run has stopped

def load(batches, first, device):
    """Yields the batches from number first on, without end, on the device."""
    workers = num_workers
    if workers < 0:
        workers = min(8, os.cpu_count()) * (dataset != 'shapes' or device.type != 'cpu')
    loader = torch.utils.data.DataLoader(
        batches, None, sampler=range(first, 10**9), num_workers=workers, worker_init_fn=leave_process_group)
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield [x if x is None else x.to(device, non_blocking=True) for x in batch]

# optimizers -------------------------------------------------------------------------------------------
class Muon(torch.optim.Optimizer):
    """Momentum whose step for each matrix is made orthogonal (Keller Jordan 2024). A convolution counts as a
    matrix (out, all else)."""
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                mean = self.state[p].setdefault('mean', torch.zeros_like(p))
                mean.lerp_(p.grad, 0.05)
                update = orthogonalize(p.grad.lerp(mean, 0.95).flatten(1))  # Nesterov momentum
                scale = math.sqrt(max(1, update.size(0) / update.size(1)))
                p.mul_(1 - group['lr'] * group['weight_decay'])
                p.add_(update.view(p.shape), alpha=-group['lr'] * scale)

def orthogonalize(x):
    """Newton-Schulz iteration: moves all singular values of a matrix towards 1."""
    tall = x.size(0) > x.size(1)
    y = x / (x.norm() + 1e-7)
    if tall:
        y = y.T
    if dtype == 'bfloat16':
        y = y.bfloat16()
    for _ in range(5):
        a = y @ y.T
        b = torch.addmm(a, a, a, beta=-4.775, alpha=2.0315)
        y = torch.addmm(y, b, y, beta=3.4445)
    return (y.T if tall else y).to(x.dtype)

def make_optimizers(model):
    """Muon for the matrices inside the model; AdamW for embeddings, positions, the first convolution, norms
    and biases, or for everything. Only matrices have weight decay."""
    parts = ['vision', 'projection', 'decoder']
    frozen = re.findall(r'[^,]+', freeze)
    check(set(frozen) < set(parts), f'freeze={freeze} must be one or two of {", ".join(parts)}')
    scales = dict(re.findall(r'(\w+)=([\d.e-]+)', lr_scale))
    check(set(scales) <= set(parts), f'lr_scale={lr_scale} must be like vision=0.1,decoder=0.1')
    muon, adamw = [], []
    for name, p in model.named_parameters():
        part = name.split('.')[0]
        p.requires_grad_(part not in frozen)
        outer = re.search('embedding|position|latents|stem.(0.)?weight|layers.0.weight', name)
        hidden = p.dim() > 1 and not outer
        groups, rate = adamw, learning_rate
        if hidden and optimizer == 'muon':
            groups, rate = muon, muon_lr
        rate *= float(scales.get(part, 1))
        if p.requires_grad:
            groups.append(dict(params=[p], full_lr=rate, weight_decay=weight_decay * hidden))
    optimizers = []
    if muon:
        optimizers.append(Muon(muon, {}))
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, betas=(0.9, 0.95), fused=True))
    return optimizers

def rate_factor(step):
    """Rises over warmup_iters, then falls in a straight line, to min_lr at lr_decay_iters."""
    end = lr_decay_iters or max_iters
    left = (end - step) / max(1, end - warmup_iters)
    return min(1, (step + 1) / (warmup_iters + 1)) * (min_lr + (1 - min_lr) * min(1, max(0, left)))

# evaluation -------------------------------------------------------------------------------------------
def choose_items(data, n, kind='caption or question'):
    """n held-out (image, prompt, truth), always the same: a text of each image, then another, ..."""
    items = []
    for i in range(n):
        image, texts = data[i % data.n_images]
        texts = [text for text in texts if ('question' if text[0] else 'caption') in kind]
        items.append((image, *texts[(i + i // data.n_images) % len(texts)]))
    return items

def exact_answers(model, tok, items, title):
    """Prints and returns the share of items that greedy generation answers word for word: those in which every
    token of the truth is the most likely one after the tokens before it."""
    where = model.decoder.embedding.weight.device
    right = collections.defaultdict(list)
    for i in range(0, len(items), 100):
        batch = [(image, [(prompt, truth)]) for image, prompt, truth in items[i : i + 100]]
        images, ids, targets, _ = collate(batch, model.cfg, tok, make_transform(model.cfg))
        logits, _ = model(images.to(where), ids.to(where), targets.to(where))
        likeliest = targets.clone()
        likeliest[targets != -100] = logits.argmax(dim=-1).cpu()
        exact = (likeliest == targets).all(dim=1).tolist()
        for (_, [(prompt, _)]), said_it in zip(batch, exact):
            right[' '.join(prompt.split()[:2]) or 'caption'].append(said_it)
    share = sum(map(sum, right.values())) / len(items)
    common = sorted(right, key=lambda kind: -len(right[kind]))[:8]
    each = [f'{kind} {sum(right[kind]) / len(right[kind]):.1%}' for kind in sorted(common)]
    details = f' ({", ".join(each)})' * (len(each) > 1)
    print(f'exact answers: {share:.1%} of {len(items)} {title}{details}')
    return share

def draw_samples(model, tok, items, path):
    """A contact sheet of 12 images with the model's answers, green where they are exact."""
    page = Image.new('RGB', (960, 930), 'white')
    where = model.decoder.embedding.weight.device
    for n, (image, prompt, truth) in enumerate(items):
        pixels = make_transform(model.cfg)(image)[None].to(where)
        ids = torch.tensor([encode_prompt(tok, model.cfg, prompt)], device=where)
        row = model.generate(pixels, ids, model.cfg.block_size, temperature=0, stop=tok.end)[0]
        said = tok.decode(row[ids.size(1) :].tolist()).strip()
        text = '\n'.join(textwrap.wrap(f'{prompt} {said}'.strip(), 36)[:4])
        color = 'green' if said == truth.strip() else 'firebrick'
        x, y = 240 * (n % 4) + 5, 310 * (n // 4) + 5
        page.paste(image.resize((230, 230)), (x, y))
        ImageDraw.Draw(page).text((x, y + 232), text, color, font_size=13)
    page.save(path)

@torch.no_grad()
def evaluate(model, batches, step, last, device):
    """Prints losses and exact answers on held-out data, draws samples.png -> the figures for log.csv"""
    model.eval()
    data, tok = batches.data, batches.tokenizer
    own = swapped = tokens = characters = 0
    for _, (images, ids, targets, positions) in zip(range(eval_iters), load(batches, 0, device)):
        scored = targets[targets != -100].tolist()
        own += model(images, ids, targets, positions)[1].item() * len(scored)
        swapped += model(images.roll(1, 0), ids, targets, positions)[1].item() * len(scored)
        tokens += len(scored)
        characters += len(tok.decode(scored))
    bits = own / characters / math.log(2)
    own /= tokens
    swapped /= tokens
    share = math.nan
    gain = f'with images swapped {swapped:.4f}, image gain {swapped - own:.4f}'
    if len(images) == 1:
        gain = 'image gain unknown: it takes two images in a batch'
    print(f'step {step}: held-out loss {own:.4f}, {gain}, {bits:.4f} bits per character')
    if eval_samples and last and dataset == 'shapes':
        n = 5 * eval_samples
        novel = Shapes('novel', seed)
        exact_answers(model, tok, choose_items(data, n, 'caption'), 'captions')
        exact_answers(model, tok, choose_items(novel, n, 'caption'), 'captions with unseen pairs')
        share = exact_answers(model, tok, choose_items(data, n, 'question'), 'questions')
    elif eval_samples:
        share = exact_answers(model, tok, choose_items(data, eval_samples), 'held-out items')
    draw_samples(model, tok, choose_items(data, 12), os.path.join(os.path.expanduser(out_dir), 'samples.png'))
    return own, swapped, share

# the run ----------------------------------------------------------------------------------------------
def take_over(stored):
    """Takes over the settings of a stopped run: only those that are settings here, too, of the same type."""
    here = override(globals(), [])
    for name in set(stored) & set(here) - {'out_dir', 'init_from', 'eval_only', 'overwrite'}:
        if type(stored[name]) is type(here[name]):
            globals()[name] = stored[name]

def make_model(texts):
    """-> the model and the tokenizer of a new run, by the settings; texts: what a tokenizer can learn from"""
    if os.path.isfile(os.path.expanduser(init_from)):
        return load_checkpoint(os.path.expanduser(init_from))[:2]
    names = init_from
    if init_from == 'pretrained':
        names = {'nanovlm': 'siglip-b-16,smollm2-135m'}.get(preset, 'siglip-b-16,gpt2')
    published = {}
    if names != 'scratch':
        for name in names.split(','):
            published |= read_config(name)
    cfg = vars(PRESETS[preset]) | published
    tok = Tokenizer.make(tokenizer or cfg['tokenizer'], texts, vocab_size or cfg['vocab_size'])
    if 'text' not in published:
        cfg['vocab_size'] = tok.vocab_size
    check(tok.vocab_size <= cfg['vocab_size'], f'tokenizer={tok.name} has more tokens than the model')
    chosen = dict(image_size=image_size, block_size=block_size, projection=projection)
    cfg |= {name: value for name, value in chosen.items() if value}
    if dropout >= 0:
        cfg |= {part: replace(cfg[part], dropout=dropout) for part in ('vision', 'text')}
    cfg = VLMConfig(**cfg | dict(tokenizer=tok.name))
    if published:
        return MinimalVLM.from_pretrained(names, cfg), tok
    return MinimalVLM(cfg), tok

def main(argv=None):
    global dtype
    # 1. settings: a resumed run has those of the stopped one, but for what the command line changes
    settings = override(globals(), argv)
    check(preset in PRESETS, f'preset={preset} must be one of {", ".join(PRESETS)}')
    step = 0
    folder = os.path.expanduser(out_dir)
    path = os.path.join(folder, 'ckpt.pt')
    if init_from == 'resume':
        model, tok, checkpoint = load_checkpoint(path)
        take_over(checkpoint['settings'])
        settings = override(globals(), argv)
        step = checkpoint['step']
        for name in 'preset tokenizer vocab_size image_size block_size projection dropout'.split():
            same = settings[name] == checkpoint['settings'][name]
            check(same, f'{name}={settings[name]}: a resumed run keeps its model as it was made')
    elif os.path.exists(path):
        check(overwrite, f'{path} exists: --init_from=resume goes on, --overwrite replaces it')

    # 2. device, precision and processes
    where, dtype = find_device(device, dtype)
    rank = int(os.environ.get('RANK', 0))
    world = int(os.environ.get('WORLD_SIZE', 1))
    check(batch_size >= world, f'batch_size={batch_size}: each of {world} processes needs an image')
    if rank > 0:
        sys.stdout = open(os.devnull, 'w')  # one process tells
    if world > 1:
        dist.init_process_group(timeout=datetime.timedelta(hours=2))  # others wait while one evaluates
    precision = torch.autocast(where.type, getattr(torch, dtype), enabled=dtype != 'float32')
    scaler = torch.amp.GradScaler(where.type, enabled=dtype == 'float16')
    torch.set_float32_matmul_precision('high')
    torch.manual_seed(seed)

    # 3. data, model and optimizers
    train_set, val_set = make_datasets()
    if init_from != 'resume':
        model, tok = make_model([' '.join(text) for texts in train_set.texts for text in texts])
    train_set.size = val_set.size = int(model.cfg.image_size * (1.4 if augment else 1))
    model.to(where, memory_format=torch.channels_last)  # convolutions are faster in this format
    for module in model.modules():
        module.grad_checkpointing = grad_checkpointing
    optimizers = make_optimizers(model)
    if step:
        for o, state in zip(optimizers, checkpoint['optimizers']):
            o.load_state_dict(state | dict(param_groups=o.state_dict()['param_groups']))
        scaler.load_state_dict(checkpoint['scaler'])
    net = model
    if compile:
        net = torch.compile(net)
    if world > 1:
        net = torch.nn.parallel.DistributedDataParallel(net)
    val_batches = Batches(val_set, model.cfg, tok)
    batches = Batches(train_set, model.cfg, tok, rank, world, augment)
    stream = load(batches, step * gradient_accumulation_steps, where)

    # 4. log files; a signal stops the run after a step, a second one at once
    os.makedirs(folder, exist_ok=True)
    log = open(f'{folder}/log.csv' if rank == 0 else os.devnull, 'a' if step else 'w', buffering=1)
    if step == 0:
        print('step,seconds,loss,val_loss,val_loss_swapped,exact', file=log)
    stopped = []
    def stop(number, frame):
        stopped.append(number)
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f'{preset}: {size:.2f}M parameters, {tok.vocab_size} tokens, {where}, {dtype}')

    losses = []
    skipped = 0
    first = step
    since = began = time.time()
    while True:
        # 5. save and evaluate, now and then and at the end; a signal to one process stops all
        halt = torch.tensor(len(stopped))
        if world > 1:
            halt = halt.to(where)
            dist.all_reduce(halt)
        last = bool(halt) or step >= max_iters or eval_only
        if rank == 0 and (last or step % eval_interval == 0 and step > first):
            if not eval_only:
                state = dict(step=step, settings=settings, scaler=scaler.state_dict())
                state['optimizers'] = [o.state_dict() for o in optimizers]
                save_checkpoint(path, model, tok, **state)
            if not halt:
                with precision:
                    own, swapped, share = evaluate(model, val_batches, step, last, where)
                seconds = time.time() - began
                print(f'{step},{seconds:.1f},,{own:.5f},{swapped:.5f},{share:.4f}', file=log)
            since = time.time()
        if last:
            break

        # 6. gradients, averaged over the batches of a step
        step_batches = [next(stream) for _ in range(gradient_accumulation_steps)]
        torch.manual_seed((seed + step) * world + rank)  # of dropout: a resumed run repeats it
        buffers = [buffer.clone() for buffer in model.buffers()]
        model.train()
        for part in re.findall(r'\w+', freeze):
            model.get_submodule(part).eval()  # the statistics of its batch norms stay, too
        for n, batch in enumerate(step_batches, 1):
            net.require_backward_grad_sync = n == len(step_batches)
            with precision:
                loss = net(*batch)[1] / len(step_batches)
            scaler.scale(loss).backward()
            losses.append(loss.detach())

        # 7. the optimizers' step; none if a gradient is not finite, and then nothing of it stays
        for o in optimizers:
            scaler.unscale_(o)
            for group in o.param_groups:
                group['lr'] = group['full_lr'] * rate_factor(step)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        if torch.isfinite(norm):
            skipped = 0
            for o in optimizers:
                scaler.step(o)
        else:
            skipped += 1
            for buffer, before in zip(model.buffers(), buffers):
                buffer.copy_(before)
            print(f'step {step}: the gradient is not finite, so the step is skipped')
            limit = 30 if dtype == 'float16' else 5  # a scaler finds its scale by skipping steps
            check(skipped < limit, f'{skipped} steps skipped: try --dtype=float32, or lower rates')
        scaler.update()
        model.zero_grad()
        step += 1

        # 8. the log, of this process
        if step % log_interval == 0:
            n = len(losses) / gradient_accumulation_steps
            loss = sum(losses).item() / n
            seconds = (time.time() - since) / n
            images = batch_size * gradient_accumulation_steps / seconds
            left = (max_iters - step) * seconds / 60
            print(f'step {step}/{max_iters}: loss {loss:.4f}, {seconds * 1000:.0f} ms, '
                  f'{images:.0f} images/s, {left:.1f} min left', flush=True)
            print(f'{step},{time.time() - began:.1f},{loss:.5f},,,', file=log)
            losses = []
            since = time.time()
    if halt:
        print(f'stopped at step {step}: --init_from=resume goes on')
    else:
        print(f'{step} steps, {time.time() - began:.0f} s. Now: python sample.py --out_dir={out_dir}')

if __name__ == '__main__':
    try:
        main()
    except UserError as e:
        sys.exit(f'train.py: {e}')
