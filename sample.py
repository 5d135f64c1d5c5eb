"""
Describes pictures and answers questions about them, with a model from train.py or public weights.

    python sample.py                                     draws a scene and says what is in it
    python sample.py --image=cat.jpg                     describes a picture (or folder, pattern, a.jpg,b.jpg)
    python sample.py --image=cat.jpg --prompt="what is it?" --choices="a cat,a dog"      which is likelier
    python sample.py --image=cat.jpg --attention=look.png     draws where it looked for each word
    python sample.py --image=photos --save=captions.csv       makes a data set that train.py can read
"""
import itertools, math, os, signal, sys, time
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF
from data import Shapes, contact_sheet, find_pictures, open_table, read_pictures
from train import check_compiler, find_device
from vlm import MinimalVLM, Tokenizer, UserError, check, encode_answer, encode_prompt
from vlm import load_checkpoint, open_image, override, read_config

# settings ---------------------------------------------------------------------------------------------
out_dir = 'out'                  # folder with the ckpt.pt of train.py
init_from = ''                   # another checkpoint or public weights: name, repository, folder
image = ''                       # a file, a.jpg,b.jpg, a folder or a pattern; '' = draw a scene
prompt = ''                      # a question; '' = describe the picture
choices = ''                     # comma-separated answers to rank; '' = generate one
save = ''                        # a .csv file for the answers; pictures already in it are skipped
attention = ''                   # a PNG file to draw: where the model looked for each word
batch_size = 16                  # pictures processed together
num_samples = 1                  # answers per picture; use with temperature > 0
max_new_tokens = 100             # maximum length of an answer, in tokens
temperature = 0.0                # 0 = always the most likely token, 1 = unchanged distribution
top_k = 0                        # if temperature > 0, sample from the k most likely tokens; 0 = from all
top_p = 0.9                      # sample from the top tokens with this total probability; 1 = all
seed = time.time_ns() % 2**31    # for sampling; random by default
device = 'auto'                  # 'auto', 'cpu', 'mps', 'cuda', 'cuda:1', ...
dtype = 'auto'                   # 'auto', 'float32', 'bfloat16' or 'float16'
compile = False                  # torch.compile: on a GPU faster after minutes of compiling; no gain on a CPU

# the model --------------------------------------------------------------------------------------------
def load_model(where):
    """Loads init_from, else the checkpoint in out_dir, else (for a given picture) the public nanoVLM-222M."""
    path = os.path.expanduser(init_from or f'{out_dir}/ckpt.pt')
    if image and not init_from and not os.path.exists(path):
        print(f'no {path}: using the public nanoVLM-222M (888 MB, in {torch.hub.get_dir()})', file=sys.stderr)
        path = 'nanovlm-222m'
    if path.endswith('.pt'):
        model, tok, extra = load_checkpoint(path, where)
        usual_prompt = not prompt or (prompt.islower() and prompt.endswith('?'))
        usual_image = not image or image.endswith('drawn.png')
        if not (usual_prompt and usual_image) and extra.get('settings', {}).get('dataset') == 'shapes':
            print('this model only knows drawn shapes, and questions in lower case with a ? at the end; for '
                  'photos, add --init_from=nanovlm-222m', file=sys.stderr)
        return model, tok
    check({'encoder', 'text'} <= {*read_config(path)}, f'{path} is only an encoder or a decoder; see README')
    model = MinimalVLM.from_pretrained(path).to(where)
    return model, Tokenizer.make(path if os.path.exists(f'{path}/tokenizer.json') else model.cfg.tokenizer)

# answers ----------------------------------------------------------------------------------------------
def rank_choices(model, tok, pixels, ids, texts):
    """Prints the texts, the likeliest first, with probabilities normalized over them."""
    answers = [ids.new_tensor(encode_answer(tok, model.cfg, text)) for text in texts]
    probs = model.score(pixels, ids, answers).softmax(dim=0)
    for i in probs.argsort(descending=True).tolist():
        print(f'{probs[i]:7.1%}  {texts[i]}')

def stream_answer(model, tok, pixels, ids, options):
    """Prints an answer as it is generated, then the speed. -> its token ids"""
    said, times = [], [time.time()]
    def new_tokens():
        for token in model.stream(pixels[None], ids[None], max_new_tokens, **options):
            said.append(token.item())
            times.append(time.time())
            yield said[-1]
    for i, piece in enumerate(tok.stream(new_tokens())):
        print(piece if i else piece.lstrip(), end='', flush=True)
    rate = (len(said) - 1) / max(1e-9, times[-1] - times[1])
    print(f'\n[first token after {1000 * (times[1] - times[0]):.0f} ms, then {rate:.0f} tokens/s]')
    return [token for token in said if token != tok.end]

def answer_in_batches(model, tok, paths, ids, options, failed):
    """Yields (path, answer), num_samples times for each picture; prints the time left."""
    size = batch_size if num_samples == 1 else 1  # several samples: one picture, encoded once
    began = time.time()
    for n in range(0, len(paths), size):
        batch = list(read_pictures(paths[n : n + size], model.cfg, ids.device, failed))
        if batch:
            names, pixels = zip(*batch)
            rows = ids.expand(len(batch) * num_samples, -1)
            rows = model.generate(torch.stack(pixels), rows, max_new_tokens, **options)
            for path, row in zip(names * num_samples, rows[:, len(ids) :].tolist()):
                yield path, ' '.join(tok.decode(row).split())
        left = len(paths) - n - size
        if left > 0:
            each = (time.time() - began) / (n + size)
            print(f'{left} pictures left, {each:.2f} s each: {left * each / 60:.1f} min', file=sys.stderr)

def draw_attention(model, tok, pixels, ids, said, picture, path):
    """Saves the picture and, for each word, the visual tokens it attended to more than others did."""
    check(said and model.cfg.projection != 'perceiver', 'cannot draw attention: empty answer, or Perceiver')
    layers = [block.attn for block in model.decoder.transformer.blocks]
    for attn in layers:
        attn.keep_map = True
    model(pixels[None], torch.cat([ids, ids.new_tensor(said)])[None])
    maps = torch.cat([attn.attn_map for attn in layers]).float().mean(dim=(0, 1)).cpu()  # over layers, heads
    rows = maps[-1 - len(said) : -1, : model.cfg.n_visual]  # token i was predicted by query i - 1
    rows = rows / rows.sum(dim=1, keepdim=True)
    usual = rows.mean(dim=0) * (len(said) > 1)  # 0 if there is nothing to compare with
    rows = (rows - usual).clamp(min=0).unflatten(1, (1, math.isqrt(model.cfg.n_visual), -1))
    starts = [i for i, token in enumerate(said) if i == 0 or tok.decode([token]).startswith(' ')]
    picture = open_image(picture, 312).resize((312, 312))
    tiles = [(picture, [('(the image)', 'black')])]
    for i, j in itertools.pairwise([*starts, len(said)]):  # a word may be several tokens
        word = tok.decode(said[i:j]).strip(' ,.')
        if word not in 'a an and at in is of on the to with'.split():  # these attend everywhere
            looked = rows[i:j].sum(dim=0) + 1e-9
            mask = TF.to_pil_image(0.7 * looked / looked.max()).resize(picture.size, Image.NEAREST)
            orange = Image.new('RGB', picture.size, 'orangered')
            tiles.append((Image.composite(orange, picture, mask), [(word, 'black')]))
    contact_sheet(tiles, path, columns=5, width=192)

# the run ----------------------------------------------------------------------------------------------
def main(argv=None):
    override(globals(), argv)
    for name in ('num_samples', 'max_new_tokens', 'batch_size'):
        check(globals()[name] > 0, f'{name} must be at least 1')
    check(num_samples == 1 or temperature > 0, 'at temperature=0 all samples are the same')
    texts = [text.strip() for text in choices.split(',') if text.strip()]
    check(texts or not choices, f'choices={choices} must be comma-separated answers')
    check(not texts or not (attention or save), 'choices cannot be combined with attention or save')
    check(image or not save, 'save needs an image')
    where, precision = find_device(device, dtype)
    torch.manual_seed(seed)
    torch.set_grad_enabled(False)
    paths = find_pictures(image) if image else [os.path.expanduser(f'{out_dir}/drawn.png')]
    single = len(paths) == 1 and num_samples == 1 and not save
    map_path = os.path.expanduser(attention)
    drawable = map_path.lower().endswith('.png') and os.path.isdir(os.path.dirname(map_path) or '.')
    check(drawable or not attention, f'attention={attention}: not a .png file in an existing folder')
    is_input = os.path.realpath(map_path) in map(os.path.realpath, paths)
    check(not is_input, f'attention={attention} would replace the picture')
    check(single or not attention, 'attention needs one picture and num_samples=1, without save')
    if save:
        append, paths = open_table(save, paths, prompt)
    model, tok = load_model(where)
    model.to(getattr(torch, precision))
    if compile:
        check_compiler()
        model.decoder.compile(dynamic=True)
    if not image:
        os.makedirs(os.path.dirname(paths[0]), exist_ok=True)
        Shapes('val', seed, pixels=512)[0][0].save(paths[0])
    ids = torch.tensor(encode_prompt(tok, model.cfg, prompt), device=where)
    if len(tok.encode(prompt)) > len(ids):
        print(f'the prompt is too long: only its last {len(ids)} tokens are used', file=sys.stderr)
    options = dict(temperature=temperature, top_p=top_p, top_k=top_k, stop=tok.end)
    failed = []
    if texts or single:
        for path, pixels in read_pictures(paths, model.cfg, where, failed):
            print(f'{path}: {prompt}'.removesuffix(': '))
            if texts:
                rank_choices(model, tok, pixels, ids, texts)
            else:
                said = stream_answer(model, tok, pixels, ids, options)
                if attention:
                    draw_attention(model, tok, pixels, ids, said, path, map_path)
    else:
        for path, answer in answer_in_batches(model, tok, paths, ids, options, failed):
            print(f'{path}: {answer}')
            if save:
                append(path, answer)
    sys.exit(bool(failed))

if __name__ == '__main__':
    sys.stdout.reconfigure(errors='replace')  # for names and answers a terminal cannot show
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C stops at once, without a traceback
    if hasattr(signal, 'SIGPIPE'):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # exit quietly when piped into `head`
    try:
        main()
    except (UserError, OSError) as e:
        sys.exit(f'sample.py: {e}')
