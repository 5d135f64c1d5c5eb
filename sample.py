"""
Describes pictures and answers questions about them, with a model from train.py or public weights.

    python sample.py                                     draws a scene and says what is in it
    python sample.py --image=cat.jpg                     describes a picture (folder, pattern, a.jpg,b.jpg)
    python sample.py --image=cat.jpg --prompt="what is it?" --choices="a cat,a dog"      which is likelier
    python sample.py --image=cat.jpg --attention=look.png     draws where it looked for each word
"""
import glob, math, os, signal, sys, time
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
attention = ''                   # a PNG file to draw: where the model looked for each word
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

# one picture ------------------------------------------------------------------------------------------
def rank_choices(model, tok, pixels, ids):
    """Prints the choices, the likeliest first, with probabilities normalized over them."""
    texts = [text.strip() for text in choices.split(',') if text.strip()]
    answers = [ids.new_tensor(encode_answer(tok, model.cfg, text)) for text in texts]
    probs = model.score(pixels, ids, answers).softmax(dim=0)
    for i in probs.argsort(descending=True).tolist():
        print(f'{probs[i]:7.1%}  {texts[i]}')

def talk(model, tok, pixels, ids):
    """Prints an answer as it comes, or several, and the speed. -> token ids of the first"""
    times, steps = [time.time()], []  # the tokens of all rows, step by step
    def arriving():
        rows = ids.expand(num_samples, -1)
        for token in model.stream(pixels[None], rows, max_new_tokens, temperature, top_p, top_k, tok.end):
            steps.append(token[:, 0].tolist())
            times.append(time.time())
            yield steps[-1][0]
    if num_samples == 1:
        for i, piece in enumerate(tok.stream(arriving())):
            print(piece if i else piece.lstrip(), end='', flush=True)
        print()
    else:
        list(arriving())
        for row in zip(*steps):
            print('-', tok.decode(row).strip())
    rate = (len(steps) - 1) * num_samples / max(1e-9, times[-1] - times[1])
    print(f'[first token after {1000 * (times[1] - times[0]):.0f} ms, then {rate:.0f} tokens/s]')
    return [step[0] for step in steps if step[0] != tok.end]

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
def find_pictures():
    """The paths given by --image; if empty, draws a scene into out_dir."""
    if not image:
        from train import Shapes
        folder = os.path.expanduser(out_dir)
        os.makedirs(folder, exist_ok=True)
        Shapes('val', seed, pixels=512)[0][0].save(f'{folder}/drawn.png')
        return [f'{folder}/drawn.png']
    paths = []
    for part in [image] if os.path.exists(image) else image.split(','):
        part = os.path.expanduser(part.strip())
        if os.path.isdir(part):
            paths += [f'{part}/{name}' for name in sorted(filter(is_picture, os.listdir(part)))]
        elif os.path.exists(part) or not glob.has_magic(part):
            paths.append(part)
        else:
            paths += sorted(glob.glob(part))
    check(paths, f'image={image}: no picture found')
    return paths

def load_model(where):  # a checkpoint or public weights
    path = os.path.expanduser(init_from or f'{out_dir}/ckpt.pt')
    if path.endswith('.pt'):
        return load_checkpoint(path, where)[:2]
    model = MinimalVLM.from_pretrained(init_from).to(where)
    beside = os.path.exists(f'{path}/tokenizer.json')
    return model, Tokenizer.make(path if beside else model.cfg.tokenizer)

def main(argv=None):
    override(globals(), argv)
    check(min(num_samples, max_new_tokens) > 0, 'num_samples and max_new_tokens must be at least 1')
    check(num_samples == 1 or temperature > 0, 'several samples need a temperature above 0')
    where, precision = find_device(device, dtype)
    torch.manual_seed(seed)
    torch.set_grad_enabled(False)
    model, tok = load_model(where)
    model.to(getattr(torch, precision))
    if compile:
        model.decoder.compile(dynamic=True)
    paths = find_pictures()
    map_path = os.path.expanduser(attention)
    drawable = map_path.endswith('.png') and os.path.isdir(os.path.dirname(map_path) or '.')
    check(not attention or drawable, f'attention={attention} is not a .png file in an existing folder')
    check(not attention or len(paths) == 1, 'attention is for one picture at a time')
    failed = 0
    for path in paths:
        try:
            pixels = image_transform(model.cfg)(open_image(path, model.cfg.image_size)).to(where)
        except UserError as e:  # the other pictures still get their answer
            print(f'sample.py: {e}', file=sys.stderr)
            failed = 1
            continue
        print(': '.join(filter(None, [path, prompt])))
        ids = torch.tensor(encode_prompt(tok, model.cfg, prompt), device=where)
        if choices.strip(', '):
            rank_choices(model, tok, pixels, ids)
            continue
        said = talk(model, tok, pixels, ids)
        if attention and said:
            draw_attention(model, tok, pixels, ids, said, map_path)
    sys.exit(failed)

if __name__ == '__main__':
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends quietly in front of `| head`
    try:
        main()
    except UserError as e:
        sys.exit(f'sample.py: {e}')
