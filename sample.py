"""
Describes pictures and answers questions about them, with a model from train.py or public weights.

    python sample.py                                     draws a scene and says what is in it
    python sample.py --image=cat.jpg                     describes a picture (folder, pattern, a.jpg,b.jpg)
    python sample.py --image=cat.jpg --prompt="what is it?" --choices="a cat,a dog"      which is likelier
    python sample.py --image=cat.jpg --attention=look.png     draws where it looked for each word
    python sample.py --image=photos --save=captions.csv       writes a data set for train.py, too
"""
import csv, glob, itertools, math, os, signal, sys, time
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as TF
from vlm import (MinimalVLM, Tokenizer, UserError, check, encode_answer, encode_prompt, image_transform,
                 load_checkpoint, open_image, override)

# settings ---------------------------------------------------------------------------------------------
out_dir = 'out'                  # folder with the ckpt.pt of train.py
init_from = ''                   # another checkpoint, or public weights: a name, repository or folder
image = ''                       # a file, several with commas, a folder or a pattern; '' = draw a scene
prompt = ''                      # a question; '' = describe the picture
choices = ''                     # comma-separated answers to rank; '' = generate one
save = ''                        # a .csv file for the answers; pictures that are in it are skipped
attention = ''                   # a PNG file to draw: where the model looked for each word
batch_size = 16                  # pictures that are answered together
num_samples = 1                  # answers per picture; use with temperature > 0
max_new_tokens = 100             # maximum length of an answer, in tokens
temperature = 0.0                # 0 = always the most likely token, 1 = unchanged distribution
top_k = 0                        # sample from the k most likely tokens; 0 = from all
top_p = 0.9                      # sample from the most likely tokens with this total probability; 1 = all
seed = time.time_ns() % 2**31    # for sampling; random by default
device = 'auto'                  # 'auto', 'cpu', 'mps', 'cuda', 'cuda:1', ...
dtype = 'auto'                   # 'auto', 'float32', 'bfloat16' or 'float16'
compile = False                  # torch.compile: for GPUs, after a minute or three; slower on a CPU

# shared with train.py ---------------------------------------------------------------------------------
def is_picture(name):
    return name.lower().endswith(tuple(Image.registered_extensions()))

def find_device(device, dtype):
    """The settings device and dtype, resolved -> torch.device, name of the dtype"""
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device('cpu')
    try:
        where = torch.device(device.replace('auto', str(found)))
        if where.type == 'cuda':
            torch.cuda.set_device(where.index or int(os.environ.get('LOCAL_RANK', 0)))
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f'device={device} does not work here; PyTorch finds {found}') from e
    if dtype == 'auto':
        dtype = 'float32'
        if where.type == 'cuda':
            dtype = 'bfloat16' if torch.cuda.is_bf16_supported(False) else 'float16'
        elif where.type == 'cpu' and torch.cpu.get_capabilities().get('avx512_bf16'):
            dtype = 'bfloat16'  # twice as fast where the processor has it, slow elsewhere
    check(dtype in ('float32', 'bfloat16', 'float16'), f'dtype={dtype} is not known')
    return where, dtype

# pictures and models ----------------------------------------------------------------------------------
def find_pictures():
    """The paths given by --image, or else that of the scene that main will draw."""
    if not image:
        return [os.path.expanduser(f'{out_dir}/drawn.png')]
    paths = []
    for part in [image] if os.path.exists(image) else image.split(','):
        part = os.path.expanduser(part.strip())
        if os.path.isdir(part):
            paths += [f'{part}/{name}' for name in sorted(filter(is_picture, os.listdir(part)))]
        elif os.path.exists(part) or not glob.has_magic(part):
            paths.append(part)
        else:
            paths += sorted(glob.glob(part))
    check(any(map(os.path.exists, paths)), f'image={image}: no picture found')
    return paths

def open_table(paths):
    """Opens the file save -> a function to append a row, and the pictures that are not in it yet."""
    path = os.path.expanduser(save)
    folder = os.path.dirname(path) or '.'  # train.py will look for the pictures from there
    try:
        file = open(path, 'a+', encoding='utf-8', newline='', buffering=1)
        file.seek(0)
        complete = file.read()[-1:] in ('', '\n')
        file.seek(0)
        rows = list(csv.reader(file))
    except (OSError, ValueError, csv.Error) as e:
        raise UserError(f'save={save} cannot be read and written ({e})') from e
    check(complete, f'save={save}: its last line is not complete, it must end with a line break')
    check(rows[:1] in ([], [['image', 'caption']]), f'save={save} does not begin with image,caption')
    table = csv.writer(file, lineterminator='\n')
    if not rows:
        table.writerow(['image', 'caption'])
    def append(picture, caption):
        table.writerow([os.path.relpath(picture, folder), caption])
    saved = {row[0] for row in rows if row}
    left = [picture for picture in paths if os.path.relpath(picture, folder) not in saved]
    print(f'{save}: {len(paths) - len(left)} of {len(paths)} pictures are in it', file=sys.stderr)
    return append, left

def load_model(where):
    """From init_from, or else out_dir's checkpoint, or else, if there is a picture, nanoVLM-222M."""
    path = os.path.expanduser(init_from or f'{out_dir}/ckpt.pt')
    name = init_from
    if image and not name and not os.path.exists(path):
        name = path = 'nanovlm-222m'
        print(f'There is no {out_dir}/ckpt.pt. Using the public nanoVLM-222M, which is downloaded once '
              f'(888 MB) to {torch.hub.get_dir()}', file=sys.stderr)
    if path.endswith('.pt'):
        model, tok, saved = load_checkpoint(path, where)
        if image and saved.get('settings', {}).get('dataset') == 'shapes':
            print('This model only knows drawn shapes. Captions of photos: python sample.py '
                  f'--init_from=nanovlm-222m --image="{image}"', file=sys.stderr)
        return model, tok
    model = MinimalVLM.from_pretrained(name).to(where)
    beside = os.path.exists(f'{path}/tokenizer.json')
    return model, Tokenizer.make(path if beside else model.cfg.tokenizer)

def read_pictures(paths, cfg, where, failed):
    """Yields (path, pixels (3,P,P)) for each picture; those that cannot be read go to the list failed."""
    for path in paths:
        try:
            yield path, image_transform(cfg)(open_image(path, cfg.image_size)).to(where)
        except UserError as e:
            print(f'sample.py: {e}', file=sys.stderr)
            failed.append(path)

# answers ----------------------------------------------------------------------------------------------
def rank_choices(model, tok, pixels, ids, texts):
    """Prints the texts, the likeliest first, with probabilities normalized over them."""
    answers = [ids.new_tensor(encode_answer(tok, model.cfg, text)) for text in texts]
    probs = model.score(pixels, ids, answers).softmax(dim=0)
    for i in probs.argsort(descending=True).tolist():
        print(f'{probs[i]:7.1%}  {texts[i]}')

def talk(model, tok, pixels, ids):
    """Prints an answer as it comes, then the speed. -> its token ids"""
    said = []
    times = [time.time()]
    def arriving():
        rows = ids[None]
        for token in model.stream(pixels[None], rows, max_new_tokens, temperature, top_p, top_k, tok.end):
            said.append(token.item())
            times.append(time.time())
            yield said[-1]
    for i, piece in enumerate(tok.stream(arriving())):
        print(piece if i else piece.lstrip(), end='', flush=True)
    rate = (len(said) - 1) / max(1e-9, times[-1] - times[1])
    print(f'\n[first token after {1000 * (times[1] - times[0]):.0f} ms, then {rate:.0f} tokens/s]')
    return [token for token in said if token != tok.end]

def answer_all(model, tok, paths, ids, failed, append):
    """Answers about many pictures, batch by batch, or several samples about each: printed and appended."""
    size = batch_size
    if num_samples > 1:
        size = 1  # samples share the visual tokens of their picture
    options = dict(temperature=temperature, top_p=top_p, top_k=top_k, stop=tok.end)
    began = time.time()
    for n in range(0, len(paths), size):
        batch = list(read_pictures(paths[n : n + size], model.cfg, ids.device, failed))
        if batch:
            pixels = torch.stack([x for _, x in batch])
            rows = ids.expand(max(len(batch), num_samples), -1)
            rows = model.generate(pixels, rows, max_new_tokens, **options)[:, len(ids) :].tolist()
            for (path, _), row in zip(itertools.cycle(batch), rows):
                answer = ' '.join(tok.decode(row).split())
                print(f'{path}: {answer}')
                if append and answer:
                    append(path, answer)
        left = max(0, len(paths) - n - size)
        each = (time.time() - began) / (len(paths) - left)
        print(f'[{left} pictures left, {each:.2f} s each: {left * each / 60:.1f} min]', file=sys.stderr)

def draw_attention(model, tok, pixels, ids, said, path):
    """Saves one copy of the picture per word, bright where the model looked (mean of layers and heads)."""
    check(model.cfg.projection != 'perceiver', 'attention: tokens of a Perceiver have no position')
    layers = [block.attn for block in model.decoder.transformer.blocks]
    for attn in layers:
        attn.keep_map = True
    model(pixels[None], torch.cat([ids, ids.new_tensor(said)])[None])
    maps = torch.stack([attn.attn_map[0].float().mean(dim=0) for attn in layers]).mean(dim=0).cpu()
    side = math.isqrt(model.cfg.n_visual)
    rows = maps[-1 - len(said) : -1, : side**2].view(-1, 1, side, side)  # query i-1 predicted token i
    words = []  # (token ids, summed map) of each
    for token, row in zip(said, rows):
        if not words or tok.decode([token]).startswith(' '):
            words.append(([], torch.zeros(1, side, side)))
        words[-1][0].append(token)
        words[-1][1].add_(row)
    page = Image.new('RGB', (170 * min(8, len(words)), 185 * math.ceil(len(words) / 8)), 'white')
    bright = TF.to_pil_image(pixels.cpu()).resize((160, 160))
    for i, (tokens, row) in enumerate(words):
        x, y = 170 * (i % 8), 185 * (i // 8)
        mask = TF.to_pil_image(TF.resize(0.25 + 0.75 * row / row.max(), [160, 160]).clamp(0, 1))
        page.paste(Image.composite(bright, Image.new('RGB', bright.size), mask), (x, y))
        ImageDraw.Draw(page).text((x, y + 162), tok.decode(tokens).strip(), 'black', font_size=15)
    page.save(path)

# the run ----------------------------------------------------------------------------------------------
def main(argv=None):
    override(globals(), argv)
    check(min(num_samples, max_new_tokens, batch_size) > 0,
          'num_samples, max_new_tokens and batch_size must be at least 1')
    check(num_samples == 1 or temperature > 0, 'several samples need a temperature above 0')
    texts = [text.strip() for text in choices.split(',') if text.strip()]
    check(not texts or not (attention or save), 'choices are only ranked: leave out attention and save')
    map_path = os.path.expanduser(attention)
    drawable = map_path.endswith('.png') and os.path.isdir(os.path.dirname(map_path) or '.')
    check(not attention or drawable, f'attention={attention} is not a .png file in an existing folder')
    where, precision = find_device(device, dtype)
    torch.manual_seed(seed)
    torch.set_grad_enabled(False)
    paths = find_pictures()
    single = len(paths) == num_samples == 1 and not save
    check(not attention or single, 'attention is for one picture at a time, and its only answer')
    append = None
    if save:
        append, paths = open_table(paths)
    model, tok = load_model(where)
    model.to(getattr(torch, precision))
    if compile:
        model.decoder.compile(dynamic=True)
    if not image:
        from train import Shapes
        os.makedirs(os.path.dirname(paths[0]), exist_ok=True)
        Shapes('val', seed, pixels=512)[0][0].save(paths[0])
    ids = torch.tensor(encode_prompt(tok, model.cfg, prompt), device=where)
    failed = []
    if not single and not texts:
        answer_all(model, tok, paths, ids, failed, append)
        sys.exit(len(failed) > 0)
    for path, pixels in read_pictures(paths, model.cfg, where, failed):
        print(': '.join(filter(None, [path, prompt])))
        if texts:
            rank_choices(model, tok, pixels, ids, texts)
            continue
        said = talk(model, tok, pixels, ids)
        if attention and said:
            draw_attention(model, tok, pixels, ids, said, map_path)
    sys.exit(len(failed) > 0)

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, without a traceback
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends quietly in front of `| head`
    try:
        main()
    except UserError as e:
        sys.exit(f'sample.py: {e}')
