"""
What train.py trains on and sample.py describes: drawn scenes, captioned photos, picture files.

Item i of a data set is (Pillow image, [(prompt, answer), ...]); an empty prompt asks for a caption.
"""
import contextlib, csv, glob, io, itertools, json, math, os, random, re, sys
from collections import defaultdict, namedtuple
from PIL import Image, ImageDraw
from vlm import UserError, check, image_transform, open_image

with contextlib.suppress(ImportError):  # optional: it lets Pillow read HEIC
    import pillow_heif
    pillow_heif.register_heif_opener()

# drawn scenes -----------------------------------------------------------------------------------------
COLORS = {
    'red': (225, 40, 40),
    'green': (40, 170, 70),
    'blue': (40, 80, 225),
    'yellow': (240, 215, 40),
    'orange': (245, 135, 25),
    'purple': (145, 55, 190),
    'cyan': (60, 205, 225),
    'black': (35, 35, 35),
}

def ring(n, turn, *radii):
    """n points (x, y) clockwise around (0, 0), the first at turn degrees (0 = up). The radii alternate."""
    angles = [math.radians(turn + 360 * i / n) for i in range(n)]
    return [(r * math.sin(angle), -r * math.cos(angle)) for r, angle in zip(itertools.cycle(radii), angles)]

SHAPES = {
    'circle': ring(36, 0, 1),
    'square': ring(4, 45, 1.25),
    'triangle': ring(3, 0, 1),
    'diamond': ring(4, 0, 1.1, 0.7),
    'star': ring(10, 0, 1.05, 0.42),
    'cross': ring(12, -15, 1.05, 1.05, 0.38),
}
SIZES = {'small': (0.105, 0.12), 'large': (0.16, 0.18)}  # radius, in picture widths
PLACES = ('at the top left, at the top, at the top right, on the left, in the center, on the right, '
          'at the bottom left, at the bottom, at the bottom right').split(', ')
NUMBERS = ['zero', 'one', 'two', 'three']
PAIRS = list(itertools.product(COLORS, SHAPES))
UNSEEN = list(zip(COLORS, SHAPES))  # red circle, green square, ... (six): never shown in training
Thing = namedtuple('Thing', 'color shape size place x y r')  # x, y, r in picture widths

class Shapes:
    """Scenes of one to three things, with a caption and questions. Scene i depends only on seed, split and i.
    'train' and 'val' never show or name an UNSEEN pair; 'novel' shows only such pairs."""
    n_images = 100_000

    def __init__(self, split, seed=0, pixels=128):
        self.split, self.seed, self.pixels = split, seed, pixels
        self.pairs = [pair for pair in PAIRS if (pair in UNSEEN) == (split == 'novel')]

    def __getitem__(self, i):
        rng = random.Random(f'{self.seed} {self.split} {i}')
        scene = self.make_scene(rng)
        asked = [text for question in QUESTIONS for text in question(scene, rng, self.pairs)]
        return self.draw(scene, rng), [('', caption(scene)), *dict.fromkeys(asked)]  # each once

    def make_scene(self, rng):
        """One to three things that hardly ever touch, in reading order."""
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

# each yields (question, answer), or nothing if it does not apply. pairs: those a question may name
def ask_count(scene, rng, pairs):
    traits = [trait for t in scene for trait in (t.color, t.shape)]
    most_common = max(traits, key=traits.count)
    trait = rng.choice(['', most_common, rng.choice(traits), rng.choice([*COLORS, *SHAPES])])
    if trait == '':
        yield 'how many objects are there?', NUMBERS[len(scene)]
    else:
        kind = 'color' if trait in COLORS else 'shape'
        yield f'how many objects have the {kind} {trait}?', NUMBERS[traits.count(trait)]

def ask_color(scene, rng, pairs):
    t = rng.choice(scene)
    colors = [u.color for u in scene] + rng.sample(list(COLORS), len(COLORS))  # those in the scene first
    wrong = [color for color in dict.fromkeys(colors) if color != t.color]
    options = ': {}, {} or {}'.format(*rng.sample([t.color, *wrong[:2]], 3))
    if [u.shape for u in scene].count(t.shape) == 1:
        yield f'what color is the {t.shape}{rng.choice(["", "", options])}?', t.color

def ask_shape(scene, rng, pairs):
    t = rng.choice(scene)
    yield f'what shape is {PLACES[t.place]}?', t.shape

# these two yield pairs of questions with opposite answers: the contrast makes them easier to learn
def ask_existence(scene, rng, pairs):
    here = sorted({(t.color, t.shape) for t in scene})
    for pair in rng.sample(here, min(2, len(here))):
        absent = [p for p in pairs if p not in here and {*p} & {*pair}]
        # the hardest, three more times: its color and its shape are there, but in different things
        absent += 3 * [p for p in absent if {*p} <= {*itertools.chain(*here)}]
        if absent:
            for (color, shape), answer in [(pair, 'yes'), (rng.choice(absent), 'no')]:
                yield f'is there {"an" if color == "orange" else "a"} {color} {shape}?', answer

def ask_side(scene, rng, pairs):
    apart = [(t, u) for t in scene for u in scene if t.place % 3 < u.place % 3]
    if apart and len({t.shape for t in scene}) == len(scene):
        t, u = rng.choice(apart)
        yield f'is the {t.shape} left or right of the {u.shape}?', 'left'
        yield f'is the {u.shape} left or right of the {t.shape}?', 'right'

QUESTIONS = 3 * [ask_count] + 2 * [ask_side, ask_color] + [ask_existence, ask_shape]  # asked about each scene

# photos with captions ---------------------------------------------------------------------------------
# accepted names of table columns and JSON keys, in any case; the first one present is used
IMAGE_NAMES = ('image', 'file_name', 'image_name', 'filename', 'image_path', 'path')
PROMPT_NAMES = ('prompt', 'question')
ANSWER_NAMES = ('caption', 'answer', 'text', 'comment')

def read_rows(path):
    """Yields (label, row) for each row of a caption file, or each photo of a folder. A row is a dict with the
    names above or, if unusable, a ValueError: yielded, as raising it would end the generator."""
    if os.path.isdir(path):
        yield from read_folder(path)
        return
    with open(path, encoding='utf-8-sig', newline='') as f:
        lines = list(f)
    if not path.lower().endswith(('.json', '.jsonl')):
        yield from table_rows(lines)
    elif path.lower().endswith('.jsonl') or has_objects_on_lines(lines):
        for n, line in enumerate(lines, 1):
            if line.strip():
                yield f'line {n}', read_json_line(line)
    else:
        data = json.loads(''.join(lines))
        if isinstance(data, dict):  # COCO captions, or a single row
            data = coco_rows(data) if {'images', 'annotations'} <= {*data} else [data]
        for n, row in enumerate(data, 1):
            yield f'entry {n}', row

def has_objects_on_lines(lines):
    """True if a .json file is really .jsonl: its first two lines that are not empty hold an object each."""
    lines = [line for line in lines if line.strip()]
    return len(lines) > 1 and all(isinstance(read_json_line(line), dict) for line in lines[:2])

def read_json_line(line):
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        return ValueError(f'not JSON ({e})')

def coco_rows(data):
    names = {str(image['id']): image.get('file_name') for image in data['images']}
    for annotation in data['annotations']:
        yield dict(image=names.get(str(annotation.get('image_id'))), caption=annotation.get('caption'))

def table_rows(lines):
    """Yields the rows below a header. A value in double quotes may span lines; but if one of them looks like
    a row itself, the quote was never closed, and the row where it opens is unusable."""
    # lines read so far: up to the header, which may follow empty lines or Excel's hint
    n_read = next((n for n, line in enumerate(lines, 1) if not re.match(r'\s*$|"?sep=', line)), 1)
    header = ''.join(lines[n_read - 1 : n_read])
    style = dict(delimiter=max('\t;|,', key=header.count), skipinitialspace=True)
    names = [name.strip() for name in next(csv.reader([header], **style), [])]
    image_columns = [i for i, name in enumerate(names) if name.lower() in IMAGE_NAMES]
    if not image_columns:
        wanted = ' or '.join(IMAGE_NAMES)
        raise ValueError(f'its header, {header.strip()[:80]!r}, has no column {wanted}')
    def looks_like_a_row(line):
        values = next(csv.reader([line], **style), [])
        return len(values) >= len(names) and is_picture(values[image_columns[0]].strip())
    while n_read < len(lines):  # a row may span several: lines[start:n_read]
        start = n_read
        try:
            reader = csv.reader(map(lines.__getitem__, range(start, len(lines))), **style)
            values = next(reader)
            n_read = start + reader.line_num  # csv takes as many lines as one row has
            while len(values) > len(names) and not values[-1].strip():
                values.pop()  # Excel pads rows with empty values
            row = dict(zip(names, values))
            if len(values) > len(names):
                row = ValueError('more values than columns: put double quotes around a text with separators')
            if any(map(looks_like_a_row, lines[start + 1 : n_read])):
                row = ValueError('a double quote is not closed')
                n_read = start + 1  # go on below the line where it opens
        except csv.Error as e:
            row = ValueError(e)
            n_read = start + 1
        if ''.join(lines[start:n_read]).strip(' \t\r\n,;|'):  # skip empty rows
            yield f'line {start + 1}', row

def read_folder(path):
    """Yields the rows of metadata.csv or metadata.jsonl if there is one; else a row per photo, captioned by
    the .txt file of the same name, one caption per line, or by the name of its folder."""
    for name in ('metadata.csv', 'metadata.jsonl'):
        if os.path.isfile(os.path.join(path, name)):
            yield from read_rows(os.path.join(path, name))
            return
    first_path = {}  # photo -> first path to its file: links share it, so they are not held out apart
    by_real_path = {}
    tables = []
    seen = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        for file in [os.path.join(folder, name) for name in sorted(names)]:
            if is_picture(file):
                first_path[file] = by_real_path.setdefault(os.path.realpath(file), file)
            elif re.search(r'\.(csv|tsv|jsonl?|caption)$|captions?\w*\.txt$', file.lower()):
                tables.append(file)
    beside = {photo: os.path.splitext(photo)[0] + '.txt' for photo in first_path}
    has_captions = any(map(os.path.isfile, beside.values()))
    if tables and not has_captions:
        raise ValueError(f'it contains {tables[0]}: set dataset to that file, rename it to .txt, or move it')
    classes = {os.path.dirname(os.path.relpath(photo, path)) for photo in first_path}
    if len(classes) == 1 and not has_captions and '' not in classes:
        print(f'{path}: no photo has a .txt file and all are in one folder, so its name, {classes.pop()}, '
              'is the only text to learn', file=sys.stderr)
    for photo, text_file in beside.items():
        row = dict(image=os.path.relpath(first_path[photo], path))
        folder = os.path.dirname(os.path.relpath(photo, path))
        if is_unreadable_heic(photo):
            row = ValueError(HEIC_HELP)
        elif has_captions or not folder:
            try:
                with open(text_file, encoding='utf-8-sig') as f:
                    row['caption'] = list(f)
            except (OSError, ValueError) as e:
                row = ValueError(f'{text_file}, its captions, is missing or not UTF-8 ({e})')
        else:
            row.update(prompt='what is this?', answer=os.path.basename(folder).replace('_', ' '))
        yield photo, row

def read_texts(row):
    """The image name and the [(prompt, answer), ...] of a row. Raises ValueError if either is missing."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError('it is not an object with keys such as image and caption')
    row = {name.strip().lower(): value for name, value in row.items()}
    def get(names):
        return next((row[name] for name in names if name in row), None)
    image = get(IMAGE_NAMES)
    prompt = get(PROMPT_NAMES)
    answers = get(ANSWER_NAMES)
    if clean_text(prompt):  # a question goes with the answer, even if there is a caption, too
        answers = get(('answer', *ANSWER_NAMES))
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if not isinstance(image, str) or not image.strip():
        raise ValueError(f'it must name one image ({", ".join(IMAGE_NAMES)})')
    if '://' in image:
        raise ValueError('its image is a URL: download it and give the file name instead')
    if not isinstance(answers, list):
        answers = [answers]
    texts = [(prompt, answer) for answer in answers]
    if row.get('conversations'):  # from and value in LLaVA's format, role and content in minimind's
        turns = [(turn.get('from', turn.get('role')), turn.get('value', turn.get('content')))
                 for turn in row['conversations']]
        texts = [(question, answer) for (asker, question), (speaker, answer) in zip(turns, turns[1:])
                 if asker in ('human', 'user') and speaker in ('gpt', 'assistant')]
    texts = [(clean_text(prompt), clean_text(answer)) for prompt, answer in texts]
    texts = [(prompt, answer) for prompt, answer in texts if answer]
    if not texts:
        raise ValueError(f'it has no text ({", ".join(ANSWER_NAMES)})')
    return image.strip(), texts

def clean_text(value):
    """A value as text; '' for None and NaN. ValueError for lists and objects, or text that looks like one."""
    if value is None or value != value:  # NaN is not equal to itself
        return ''
    if isinstance(value, (int, float)):
        value = str(value)
    if not isinstance(value, str) or '\0' in value or re.match(r'\s*[\[{]\s*["\']', value):
        raise ValueError(f'{str(value)[:40]} is not text')
    text = value.replace('<image>', '').strip()
    return text.encode('utf-8', 'replace').decode()  # lone surrogates, as in broken JSON, become ?

class CaptionedImages:
    """Photos with their texts. An unreadable photo is reported and replaced by the next readable one."""
    min_size = 1  # a JPEG is decoded at this many pixels per side or more; train.py sets it

    def __init__(self, texts, folder):
        self.names, self.texts = list(texts), list(texts.values())
        self.folder, self.n_images, self.unreadable = folder, len(texts), set()

    def __getitem__(self, i):
        for j in itertools.chain(range(i, self.n_images), range(i)):
            if j not in self.unreadable:
                try:
                    check(not is_unreadable_heic(self.names[j]), f'{self.names[j]}: {HEIC_HELP}')
                    image = open_image(os.path.join(self.folder, self.names[j]), self.min_size)
                    factor = max(1, min(image.size) // (2 * self.min_size))  # to save memory
                    return image.reduce(factor), self.texts[j]
                except UserError as e:
                    self.unreadable.add(j)
                    print(f'skipped: {e}', file=sys.stderr)
        raise UserError(f'none of the {self.n_images} images in {self.folder} can be read')

def find_images(path, image_dir=''):
    """Reads a caption file or a folder -> {image name: [(prompt, answer), ...]} for the images found, and the
    folder they are in. Reports what was found and what was left out."""
    path = os.path.expanduser(path)
    texts = defaultdict(list)
    unused = []
    n = 0
    try:
        for n, (label, row) in enumerate(read_rows(path), 1):
            try:
                image, pairs = read_texts(row)
                texts[os.path.normpath(image)] += pairs
            except (ValueError, TypeError, AttributeError) as e:
                unused.append(f'{label}: {e}')
    except UnicodeDecodeError as e:
        wanted = 'csv, tsv, txt, jsonl or json; in Excel, save it as "CSV UTF-8"'
        raise UserError(f'{path} is not text in UTF-8: expected {wanted}') from e
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error) as e:
        raise UserError(f'{path} cannot be used as a data set: {type(e).__name__}: {str(e)[:300]}') from e
    check(n, f'{path} has no rows or photos')
    if unused:
        check(texts, f'{path}: none of its {n} rows can be used; the first: {unused[0]}')
        print(f'{path}: {len(unused)} of {n} rows skipped; the first: {unused[0]}', file=sys.stderr)
    own_folder = path if os.path.isdir(path) else os.path.dirname(path)
    folder = os.path.expanduser(image_dir) or own_folder or '.'
    for place in (folder, f'{folder}/images', f'{folder}/Images'):
        found = defaultdict(list)
        lost = []
        for name in texts:
            spellings = [name, name.replace('\\', '/')]  # the second for a path written on Windows
            files = [file for file in spellings if os.path.isfile(os.path.join(place, file))]
            if files:
                found[files[0]] += texts[name]
            else:
                lost.append(name)
        if found:
            break
    sought = os.path.join(folder, [*texts][0])
    check(found, f'{path}: no image found, e.g. {sought!r} is missing; set --image_dir or --val_image_dir')
    if lost:
        print(f'{path}: {len(lost)} of {len(texts)} images are missing, e.g. {lost[0]!r}', file=sys.stderr)
    name = [*found][0]
    total = sum(map(len, found.values()))
    example = ' '.join(' -> '.join(filter(None, found[name][0])).split())[:80]
    print(f'{path}: {len(found)} images with {total} texts, e.g. {name!r}: {example}')
    return dict(found), place

# files of pictures ------------------------------------------------------------------------------------
HEIC_HELP = 'Pillow alone cannot read HEIC: convert it to JPEG, or install pillow-heif'

def is_unreadable_heic(path):
    return path.lower().endswith(('.heic', '.heif')) and '.heic' not in Image.registered_extensions()

def is_picture(path):
    """True if Pillow reads files with this ending, or it is HEIC, and the name does not begin with a dot."""
    name = os.path.basename(path)
    kind = Image.registered_extensions().get(os.path.splitext(name)[1].lower())
    return not name.startswith('.') and (kind in {*Image.OPEN} - {'MPEG'} or is_unreadable_heic(path))

def find_pictures(given):
    """The paths that the setting image stands for: a file, several (a.jpg,b.jpg), a folder or a pattern."""
    paths = []
    for part in ([given] if os.path.exists(os.path.expanduser(given)) else given.split(',')):
        part = os.path.expanduser(part.strip())
        if os.path.isdir(part):
            paths += [os.path.join(part, name) for name in sorted(filter(is_picture, os.listdir(part)))]
        elif os.path.exists(part) or not glob.has_magic(part):
            paths.append(part)
        else:
            paths += sorted(filter(is_picture, glob.glob(part, recursive=True)))
    check(any(map(os.path.exists, paths)), f'image={given}: no picture found')
    return list(dict.fromkeys(filter(None, paths)))  # each once

def read_pictures(paths, cfg, where, failed):
    """Yields (path, pixels (3,P,P)); a picture that cannot be read is reported and added to failed."""
    for path in paths:
        try:
            check(not is_unreadable_heic(path), f'{path}: {HEIC_HELP}')
            yield path, image_transform(cfg)(open_image(path, cfg.image_size)).to(where)
        except UserError as e:
            print(f'skipped: {e}', file=sys.stderr)
            failed.append(path)

def contact_sheet(tiles, path, columns, width):
    """Saves tiles, (Pillow image, [(line of text, color), ...]), as one PNG. width: of a tile, in pixels."""
    height = width + 29 * max(len(texts) for _, texts in tiles)
    page = Image.new('RGB', (columns * width, height * math.ceil(len(tiles) / columns)), 'white')
    for n, (image, texts) in enumerate(tiles):
        x, y = width * (n % columns) + 4, height * (n // columns) + 4
        page.paste(image.resize((width - 8, width - 8)), (x, y))
        for i, (text, color) in enumerate(texts):
            ImageDraw.Draw(page).text((x, y + width - 6 + 29 * i), text, color, font_size=24)
    page.save(path, 'png')

def open_table(path, pictures, prompt):
    """Opens a caption file -> a function that appends a row, and the pictures that have no row yet."""
    path = os.path.expanduser(path)
    folder = os.path.dirname(path) or '.'  # train.py looks up picture names from there
    columns = ['image', 'prompt', 'answer'] if prompt else ['image', 'caption']
    check(path.endswith('.csv'), f'save={path} must end in .csv')
    def key(picture):  # its row without the answer
        try:
            name = os.path.relpath(picture, folder)
        except ValueError:  # on another drive of Windows
            name = os.path.abspath(picture)
        if os.path.realpath(os.path.join(folder, name)) != os.path.realpath(picture):
            name = os.path.relpath(picture, os.path.realpath(folder))  # folder is behind a link
        return (name, prompt) if prompt else (name,)
    for name, *_ in map(key, pictures):
        check(name == name.encode(errors='replace').decode(), f'{name!r} is not UTF-8: rename it')
    try:
        file = open(path, 'a+', encoding='utf-8', errors='surrogateescape', newline='', buffering=1)
        file.seek(0)
        text = file.read().removeprefix('\ufeff')
        rows = list(csv.reader(io.StringIO(text, newline=''), strict=True))
    except (OSError, csv.Error) as e:
        raise UserError(f'save={path} cannot be opened or read ({e})') from e
    valid = not text or (rows[:1] == [columns] and text.endswith('\n'))
    check(valid, f'save={path} does not begin with {",".join(columns)}, or its last line is incomplete')
    table = csv.writer(file, lineterminator='\n')
    def append(picture, answer):
        if file.tell() == 0:
            table.writerow(columns)
        table.writerow([*key(picture), answer])
    saved = {tuple(row[:-1]) for row in rows}
    left = [picture for picture in pictures if key(picture) not in saved]
    print(f'{path}: {len(left)} of {len(pictures)} pictures still to do', file=sys.stderr)
    return append, left
