"""
What train.py learns from and sample.py talks about: drawn scenes, photos with captions, files of pictures.

Item i of a data set is (Pillow image, [(prompt, answer), ...]); an empty prompt asks for a caption.
"""
import csv, glob, io, itertools, json, math, os, random, sys
from collections import defaultdict, namedtuple
from PIL import Image, ImageDraw
from vlm import UserError, check, image_transform, open_image

# drawn scenes -----------------------------------------------------------------------------------------
COLORS = {'red': (225, 40, 40), 'green': (40, 170, 70), 'blue': (40, 80, 225), 'yellow': (240, 215, 40),
          'orange': (245, 135, 25), 'purple': (145, 55, 190), 'cyan': (60, 205, 225), 'black': (35, 35, 35)}

def ring(n, turn, *radii):
    """n points (x, y) clockwise around (0, 0), from turn degrees (0 = up); the radii are used in turn."""
    angles = [math.radians(turn + 360 * i / n) for i in range(n)]
    return [(r * math.sin(angle), -r * math.cos(angle)) for r, angle in zip(itertools.cycle(radii), angles)]

SHAPES = {'circle': ring(36, 0, 1), 'square': ring(4, 45, 1.25), 'triangle': ring(3, 0, 1),
          'diamond': ring(4, 0, 1.1, 0.7), 'star': ring(10, 0, 1.05, 0.42),
          'cross': ring(12, -15, 1.05, 1.05, 0.38)}
SIZES = {'small': (0.105, 0.12), 'large': (0.16, 0.18)}  # radius, in picture widths
PLACES = ('at the top left, at the top, at the top right, on the left, in the center, on the right, '
          'at the bottom left, at the bottom, at the bottom right').split(', ')
NUMBERS = ['zero', 'one', 'two', 'three']
PAIRS = list(itertools.product(COLORS, SHAPES))
UNSEEN = list(zip(COLORS, SHAPES))  # red circle, green square, ... (six): never shown in training
Thing = namedtuple('Thing', 'color shape size place x y r')  # x, y, r in picture widths

class Shapes:
    """Scenes of one to three things, with a caption and questions. Scene i depends only on seed, split and i.
    'train' and 'val' never show or name an UNSEEN pair; 'novel' shows only those."""
    n_images = 100_000

    def __init__(self, split, seed=0, pixels=128):
        self.split, self.seed, self.pixels = split, seed, pixels
        self.pairs = [pair for pair in PAIRS if (pair in UNSEEN) == (split == 'novel')]

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
                if scene and rng.random() < 0.3:  # share a color or a shape with the previous thing
                    pairs = [p for p in pairs if p[0] == scene[-1].color or p[1] == scene[-1].shape]
                color, shape = rng.choice(pairs)
                size = rng.choice(list(SIZES))
                x = 0.21 + 0.29 * (place % 3) + rng.uniform(-0.04, 0.04)
                y = 0.21 + 0.29 * (place // 3) + rng.uniform(-0.04, 0.04)
                scene.append(Thing(color, shape, size, place, x, y, rng.uniform(*SIZES[size])))
            both = itertools.combinations(scene, 2)
            if all(math.hypot(t.x - u.x, t.y - u.y) > t.r + u.r + 0.01 for t, u in both):
                return scene

    def draw(self, scene, rng):
        P = self.pixels
        image = Image.new('RGB', (P, P), tuple(rng.randint(225, 255) for _ in range(3)))
        for t in scene:
            shade = tuple(min(255, max(0, value + rng.randint(-30, 30))) for value in COLORS[t.color])
            corners = [(P * (t.x + t.r * x), P * (t.y + t.r * y)) for x, y in SHAPES[t.shape]]
            ImageDraw.Draw(image).polygon(corners, shade)
        return image

def caption(scene):
    things = [f'{PLACES[t.place]} a {t.size} {t.color} {t.shape}' for t in scene]
    return ' and '.join(filter(None, [', '.join(things[:-1]), things[-1]]))

# each of these returns (question, answer), or None if it does not apply; pairs: those that may be named
def ask_count(scene, rng, pairs):
    traits = [trait for t in scene for trait in (t.color, t.shape)]
    most_common = max(traits, key=traits.count)
    trait = rng.choice(['', most_common, rng.choice(traits), rng.choice([*COLORS, *SHAPES])])
    if trait == '':
        return 'how many objects are there?', NUMBERS[len(scene)]
    kind = 'color' if trait in COLORS else 'shape'
    return f'how many objects have the {kind} {trait}?', NUMBERS[traits.count(trait)]

def ask_color(scene, rng, pairs):
    t = rng.choice(scene)
    others = [u.color for u in scene] + rng.sample(list(COLORS), len(COLORS))  # likelier confusions first
    wrong = [color for color in dict.fromkeys(others) if color != t.color]
    options = ': {}, {} or {}'.format(*rng.sample([t.color, *wrong[:2]], 3))
    if [u.shape for u in scene].count(t.shape) == 1:
        return f'what color is the {t.shape}{rng.choice(["", "", options])}?', t.color

def ask_shape(scene, rng, pairs):
    t = rng.choice(scene)
    return f'what shape is {PLACES[t.place]}?', t.shape

def ask_existence(scene, rng, pairs):
    t = rng.choice(scene)
    here = [(u.color, u.shape) for u in scene]
    absent = [p for p in pairs if p not in here and (p[0] == t.color or p[1] == t.shape)]
    absent += [p for p in absent if {*p} <= {*sum(here, ())}]  # likelier: both are there, but apart
    if absent:
        pair, answer = rng.choice([((t.color, t.shape), 'yes'), (rng.choice(absent), 'no')])
        return f'is there {"an" if pair[0] == "orange" else "a"} {" ".join(pair)}?', answer

def ask_side(scene, rng, pairs):
    apart = [(t, u) for t in scene for u in scene if t.place % 3 != u.place % 3]
    if apart and len({t.shape for t in scene}) == len(scene):
        t, u = rng.choice(apart)
        return f'is the {t.shape} left or right of the {u.shape}?', 'left' if t.x < u.x else 'right'

# how often each is asked about a scene
QUESTIONS = 3 * [ask_existence, ask_count] + 2 * [ask_side, ask_color] + [ask_shape]

# photos with captions ---------------------------------------------------------------------------------
def read_captions(path):
    """Yields (image name, prompt, answer) for every row of a caption file or a folder of class folders."""
    if os.path.isdir(path):
        for folder, _, names in sorted(os.walk(path, followlinks=True)):
            label = os.path.basename(os.path.abspath(folder)).replace('_', ' ')
            for name in sorted(filter(is_picture, names)):
                yield os.path.relpath(os.path.join(folder, name), path), 'what is this?', label
        return
    try:
        with open(path, encoding='utf-8-sig', newline='') as f:
            if path.endswith('.jsonl'):
                rows = [dict(json.loads(line)) for line in f if line.strip()]
            elif path.endswith('.json'):
                rows = flatten_json(json.load(f))
            else:
                rows = list(csv.DictReader(f))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, csv.Error) as e:
        raise UserError(f'{path} is not shapes, a folder or a caption file ({e!r})') from e
    for n, row in enumerate(rows, 1):
        prompt = row.get('prompt') or row.get('question') or ''
        answer = row.get('caption', row.get('answer'))
        named = isinstance(row.get('image'), str) and None not in row  # None holds surplus fields
        complete = named and answer is not None and str(answer).strip()
        check(complete, f'{path}, row {n}: needs image and caption (or image, prompt and answer)')
        yield row['image'], str(prompt), str(answer)

def flatten_json(data):
    """COCO: a row per annotation. LLaVA: a row per turn of gpt, the turn before it being its prompt."""
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
    """Photos with their texts. Unreadable ones are reported and replaced by the next one."""
    size = 0  # pixels; JPEGs are decoded no smaller than this. main sets it, when the model is known

    def __init__(self, texts, folder):
        self.names, self.texts = list(texts), list(texts.values())
        self.folder, self.n_images, self.unreadable = folder, len(texts), set()

    def __getitem__(self, i):
        for j in itertools.chain(range(i, self.n_images), range(i)):
            if j not in self.unreadable:
                try:
                    path = os.path.join(self.folder, self.names[j])
                    return open_image(path, self.size), self.texts[j]
                except UserError as e:
                    self.unreadable.add(j)
                    print(f'skipped: {e}', file=sys.stderr)
        raise UserError(f'none of the {self.n_images} images in {self.folder} can be read')

def find_images(path, image_dir=''):
    """Returns {image name: [(prompt, answer), ...]} for the images that exist, and their folder."""
    path = os.path.expanduser(path)
    texts = defaultdict(list)
    for image, prompt, answer in read_captions(path):
        texts[image].append((prompt, answer))
    beside = path if os.path.isdir(path) else os.path.dirname(path)
    folder = os.path.expanduser(image_dir) or beside or '.'
    for place in (folder, f'{folder}/images', f'{folder}/Images'):
        found = {name: texts[name] for name in texts if os.path.isfile(os.path.join(place, name))}
        if found:
            break
    lost = [name for name in texts if name not in found]
    check(found, f'{path}: no image in {folder} ({lost[:1]}); set --image_dir')
    if lost:
        print(f'{len(lost)} of {len(texts)} images are missing, e.g. {lost[0]}', file=sys.stderr)
    return found, place

# files of pictures ------------------------------------------------------------------------------------
def is_picture(path):
    """True if Pillow reads files with this ending, and the name does not begin with a dot."""
    name = os.path.basename(path)
    kind = Image.registered_extensions().get(os.path.splitext(name)[1].lower())
    return kind in Image.OPEN and not name.startswith('.')

def find_pictures(given):
    """The paths that given stands for: a file, several with commas, a folder or a pattern."""
    paths = []
    for part in [given] if os.path.exists(os.path.expanduser(given)) else given.split(','):
        part = os.path.expanduser(part.strip())
        if os.path.isdir(part):
            paths += [f'{part}/{name}' for name in sorted(filter(is_picture, os.listdir(part)))]
        elif os.path.exists(part) or not glob.has_magic(part):
            paths.append(part)
        else:
            paths += sorted(filter(is_picture, glob.glob(part)))
    check(any(map(os.path.exists, paths)), f'image={given}: no picture found')
    return list(dict.fromkeys(filter(None, paths)))  # each once

def read_pictures(paths, cfg, where, failed):
    """Yields (path, pixels (3,P,P)); a picture that cannot be read is reported and added to failed."""
    for path in paths:
        try:
            yield path, image_transform(cfg)(open_image(path, cfg.image_size)).to(where)
        except UserError as e:
            print(f'skipped: {e}', file=sys.stderr)
            failed.append(path)

def open_table(path, pictures, prompt):
    """Opens a caption file -> a function that appends a row, and those of pictures that have no row yet."""
    path = os.path.expanduser(path)
    folder = os.path.dirname(path) or '.'  # train.py looks for pictures from there
    columns = ['image', 'prompt', 'answer'] if prompt else ['image', 'caption']
    check(path.endswith('.csv'), f'save={path} must end in .csv')
    try:
        file = open(path, 'a+', encoding='utf-8', errors='surrogateescape', newline='', buffering=1)
        file.seek(0)
        text = file.read().removeprefix('\ufeff')
        rows = list(csv.reader(io.StringIO(text, newline=''), strict=True))
    except (OSError, csv.Error) as e:
        raise UserError(f'save={path} cannot be continued ({e})') from e
    valid = not text or rows[:1] == [columns] and text.endswith('\n')
    check(valid, f'save={path} does not begin with {",".join(columns)}, or its last line is not complete')
    table = csv.writer(file, lineterminator='\n')
    if not text:
        table.writerow(columns)
    def key(picture):
        return [value for value in (os.path.relpath(picture, folder), prompt) if value]
    def append(picture, answer):
        table.writerow([*key(picture), answer])
    saved = {tuple(row[:-1]) for row in rows}
    left = [picture for picture in pictures if tuple(key(picture)) not in saved]
    print(f'{path}: {len(left)} of {len(pictures)} pictures still to do', file=sys.stderr)
    return append, left
