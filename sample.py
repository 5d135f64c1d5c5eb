"""Talks about images with a model that train.py made.

    python sample.py                                     draws a scene and says what is in it
    python sample.py --image=cat.jpg                     describes a picture; or a,b.png, a folder, 'x/*.jpg'
    python sample.py --image=cat.jpg --prompt="what is it?" --choices="a cat,a dog"  which is likelier
    python sample.py --image=cat.jpg --attention=look.png    draws where it looked for each word
    python sample.py --init_from=nanovlm-222m --image=cat.jpg --prompt="What is this?"    public weights
"""
import glob, os, signal, sys, time
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.v2.functional import to_pil_image, resize
from vlm import (Shapes, UserError, encode_prompt, explained, image_transform, load_checkpoint, open_image,
                 override, pictures_of)

# settings ---------------------------------------------------------------------------------------------------
out_dir = 'out'                  # folder with the ckpt.pt of train.py
init_from = ''                   # another checkpoint, a folder of public weights, nanovlm-222m (downloaded)
image = ''                       # a file, several with commas, a folder or a pattern; '' = draw a scene
prompt = ''                      # a question; '' = describe the image
choices = ''                     # answers with commas: says how likely each is; '' = let the model say
attention = ''                   # a picture to draw: where it looked for each word (not of --choices)
num_samples = 1                  # > 0; answers for each image
max_new_tokens = 100             # > 0; longest answer
temperature = 0.0                # >= 0; 0 = always the likeliest token, 1 = as the model has it
top_k = 0                        # >= 0; draw from so many likeliest tokens, 0 = from all
top_p = 0.9                      # > 0 and <= 1; draw from the likeliest that together reach this, 1 = all
seed = 0                         # >= 0 and < 1e18; 0 = another each time
device = 'auto'                  # 'auto', 'cpu', 'mps', 'cuda', 'cuda:1' ...
dtype = 'auto'                   # 'auto', 'float32', 'bfloat16' or 'float16'
compile = False                  # true: torch.compile, after a minute or three; for GPUs, slower on a CPU
# ------------------------------------------------------------------------------------------------------------
override(globals())
if hasattr(signal, 'SIGPIPE'): signal.signal(signal.SIGPIPE, signal.SIG_DFL)    # ends quietly before `| head`
found = getattr(torch.accelerator.current_accelerator(check_available=True), 'type', 'cpu')
device, kind = (found, found) if device == 'auto' else (device, device.split(':')[0])
with explained(f'device={device}: PyTorch finds {found} here'): torch.empty(1, device=device)
fast = 'bfloat16' if kind == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False) else 'float32'
torch.manual_seed(seed := seed or time.time_ns() % 2 ** 31)
torch.set_grad_enabled(False)
model, checkpoint = load_checkpoint(init_from or os.path.join(out_dir, 'ckpt.pt'), device)
model.to(getattr(torch, fast if dtype == 'auto' else dtype))
if compile: model.decoder.compile(dynamic=True)
tok, transform = checkpoint['tokenizer'], image_transform(model.cfg)

def pictures():
    """The paths that --image means; without it a scene is drawn beside the weights."""
    if not image:
        path = os.path.join(os.path.dirname(init_from) if init_from else out_dir, 'drawn.png')
        Shapes('val', seed, 'caption', pixels=512)[0][0].save(path)
        return [path]
    paths = []
    for part in [image] if os.path.exists(image) else image.split(','):
        if os.path.isdir(part):
            paths += [os.path.join(part, name) for name in sorted(pictures_of(os.listdir(part)))]
        else:
            paths += sorted(glob.glob(part)) if glob.has_magic(part) and not os.path.exists(part) else [part]
    if not paths:
        raise UserError(f'image={image}: there is no picture')
    return paths

def rank(pixels, ids):               # likeliest first, with probabilities among themselves
    texts = [text.strip() for text in choices.split(',') if text.strip()]
    answers = [torch.tensor(tok.encode(' ' + text) + [tok.eos], device=device) for text in texts]
    chances = model.score(pixels, ids, answers).softmax(0)
    for i in chances.argsort(descending=True).tolist():
        print(f'{chances[i]:7.1%}  {texts[i]}')

def answer(pixels, ids):
    """Prints an answer as it comes, or several at once, and how fast they came."""
    start, times, tokens = time.time(), [], []
    def arriving():
        for step in model.stream(pixels, ids, max_new_tokens, temperature, top_p, top_k, tok.eos,
                                 num_samples=num_samples):
            tokens.append(step.flatten().tolist())
            times.append(time.time() - start)
            yield tokens[-1][0]
    if num_samples == 1:
        for i, piece in enumerate(tok.stream(arriving())):
            print(piece if i else piece.lstrip(), end='', flush=True)
        print()
    else:
        list(arriving())
        for row in zip(*tokens):
            print('-', tok.decode(row).strip())
    rate = (len(times) - 1) * num_samples / (times[-1] - times[0]) if len(times) > 1 else 0
    print(f'[first token after {times[0] * 1e3:.0f} ms, then {rate:.0f} tokens/s]')
    return [row[0] for row in tokens if row[0] != tok.eos]

def draw_attention(path, pixels, ids, said):
    """Saves a tile per word: the image, bright where attention (mean of heads and layers) went, else dark."""
    if model.cfg.projection == 'perceiver':
        raise UserError('--attention: the tokens of a Perceiver resampler have no place in the image')
    attns, ids = [block.attn for block in model.decoder.blocks], torch.cat([ids, ids.new_tensor(said)])
    for attn in attns:
        attn.maps = []
    model.hidden(model.see(pixels), ids[None])
    maps = torch.stack([attn.maps[0][0].float().mean(0) for attn in attns]).mean(0)      # (L,H,S,S) -> (S,S)
    words, g = [], model.cfg.grid // model.cfg.factor
    for attn in attns:
        attn.maps = None
    for token, row in zip(said, maps[-len(said) - 1:]):          # the state before chose the token
        piece = tok.decode([token])
        words += [['', 0]] if not words or piece.startswith(' ') else []
        words[-1] = [words[-1][0] + piece, words[-1][1] + row[:g * g].view(1, g, g).cpu()]
    page = Image.new('RGB', (170 * min(8, len(words)), 185 * -(-len(words) // 8)), 'white')
    bright = to_pil_image(pixels.cpu()).resize((160, 160))
    for i, (word, row) in enumerate(words):
        x, y, mask = i % 8 * 170, i // 8 * 185, to_pil_image(resize(row / row.max(), [160, 160]).clamp(0, 1))
        page.paste(Image.composite(bright, bright.point(lambda v: v // 4), mask), (x, y))
        ImageDraw.Draw(page).text((x, y + 162), word.strip(), 'black', font_size=15)
    with explained(f'could not draw {path}'):
        page.save(path if os.path.splitext(path)[1] else f'{path}.png')

failed, paths = 0, pictures()
for number, path in enumerate(paths):
    try:
        pixels = transform(open_image(path, model.cfg.image_size)).to(device)
    except UserError as e:               # the other pictures still get their answer
        print(f'sample.py: {e}', file=sys.stderr)
        failed = 1
        continue
    print(f'{path}: {prompt}' if prompt else path)
    ids = torch.tensor(encode_prompt(tok, model.cfg, prompt), dtype=torch.long, device=device)
    said = rank(pixels, ids) if choices.strip(', ') else answer(pixels, ids)
    if attention and said:
        stem, ending = os.path.splitext(attention)
        draw_attention(attention if len(paths) == 1 else f'{stem}-{number}{ending}', pixels, ids, said)
sys.exit(failed)
