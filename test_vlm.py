"""
Tests of vlm.py, train.py and sample.py: `python -m pytest -q test_vlm.py`, in the order of the file they test.

Each holds the code against something outside it: another implementation, a hand-worked example, or the slow way.
"""
import ast, csv, json, math, os, random, re, signal, subprocess, sys, time
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import vlm
from vlm import (PRESETS, MinimalVLM, Shapes, Tokenizer, TransformerConfig, UserError, VLMConfig, collate,
                 image_transform, load_checkpoint, make_dataset, open_image, sample_top_p, save_checkpoint)

HERE = os.path.dirname(os.path.abspath(__file__))
DATA = os.path.join(HERE, '..', 'shared', 'data')
EYE = TransformerConfig(2, 4, 32)
LLAMA = TransformerConfig(2, 4, 32, n_kv_head=2, norm='rms', norm_eps=1e-5, activation='swiglu', position='rope', bias=False)
CFG = VLMConfig(EYE, LLAMA, image_size=32, patch_size=8, projection='pixel_shuffle', vocab_size=300, block_size=64)
KINDS = {'llama': CFG, 'gpt2': replace(CFG, text=EYE, class_token=True, projection='mlp', projection_hidden=64),
         'perceiver': replace(CFG, projection='perceiver', n_latents=5), 'linear': replace(CFG, projection='linear'),
         'conv': replace(CFG, text=EYE, stem='conv', input_norm=True),
         'resnet': replace(CFG, vision=TransformerConfig(1, 4, 512), encoder='resnet18', projection='linear')}

@pytest.fixture(params=KINDS)
def cfg(request):
    return KINDS[request.param]

def build(cfg, seed=0):
    torch.manual_seed(seed)
    return MinimalVLM(cfg).eval()

def some(cfg, B=3, T=7, seed=1):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(B, 3, cfg.image_size, cfg.image_size, generator=g),
            torch.randint(0, cfg.vocab_size, (B, T), generator=g))

def close(a, b, limit=1e-4):
    worst = (a - b).abs().max().item()
    assert worst <= limit, f'largest difference {worst:.2e}, allowed {limit:.0e}'

def run(script, *args, cwd, timeout=200, **more):
    env = {**os.environ, 'OMP_NUM_THREADS': '2', **more}
    return subprocess.run([sys.executable, os.path.join(HERE, script), *args], cwd=cwd, env=env, timeout=timeout,
                          capture_output=True, text=True)

# the contract -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, cap', [('vlm.py', 780), ('train.py', 300), ('sample.py', 130), ('test_vlm.py', 600)])
def test_files_keep_to_their_length_and_width(name, cap):
    with open(os.path.join(HERE, name), encoding='utf-8') as f:
        lines = f.read().splitlines()
    assert len(lines) <= cap
    assert not [i for i, line in enumerate(lines, 1) if len(line) > 110]

def test_presets_have_the_published_sizes_and_start_at_the_entropy_of_a_guess():
    """222,081,600 is nanoVLM's count; a model that knows nothing must lose ln(vocabulary) nats a token."""
    for name, cfg in PRESETS.items():
        torch.manual_seed(0)
        model = MinimalVLM(cfg)
        n = sum(p.numel() for p in model.parameters())
        assert name != 'nanovlm' or n == 222_081_600
        assert name != 'base' or 205e6 < n < 225e6
        images, ids = some(cfg, 2, 8)
        _, loss = model(images, ids, ids)
        assert abs(loss.item() / math.log(cfg.vocab_size) - 1) < 0.05, (name, loss.item())
        loss.backward()
        assert all(p.grad is not None for p in model.parameters()), name
        assert model.generate(images, ids, max_new_tokens=2).shape == (2, 10)

# 2 building blocks ------------------------------------------------------------------------------------------

def test_attend_equals_an_example_worked_by_hand():
    """Two keys with scores 0 and ln 3 (after the division by sqrt(4) = 2) are weighed 1/4 and 3/4."""
    q = torch.tensor([[[[1.0, 0, 0, 0]]]])
    k = torch.tensor([[[[0.0, 0, 0, 0], [2 * math.log(3), 0, 0, 0]]]])
    v = torch.tensor([[[[4.0, 0, 0, 0], [0, 8.0, 0, 0]]]])
    y, att = vlm.attend(q, k, v)
    close(att, torch.tensor([[[[0.25, 0.75]]]]), 1e-6)
    close(y, torch.tensor([[[[1.0, 6.0, 0, 0]]]]), 1e-5)

@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('stack', [EYE, LLAMA], ids=['heads', 'grouped'])
def test_fused_attention_equals_the_spelled_out_one(stack, causal):
    torch.manual_seed(0)
    att = vlm.Attention(stack, causal)
    x, rope = torch.randn(2, 6, 32), vlm.rope_table(6, 8, 100.0)
    mask = None if causal else (torch.rand(2, 1, 6, 6) > 0.4) | torch.eye(6, dtype=torch.bool)
    fused = att(x, mask=mask, rope=rope)
    att.maps = []
    close(att(x, mask=mask, rope=rope), fused, 1e-5)
    assert att.maps[0].shape == (2, 4, 6, 6)
    close(att.maps[0].sum(-1), torch.ones(2, 4, 6), 1e-5)
    assert not causal or att.maps[0].triu(1).abs().max() == 0

def test_rope_makes_attention_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 8)
    def score(i, j):
        table = vlm.rope_table(50, 8, 10000.0)
        return (vlm.rotate(q, table[:, i:i + 1]) * vlm.rotate(k, table[:, j:j + 1])).sum()
    close(score(3, 1), score(45, 43), 1e-5)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3

def test_gradient_checkpointing_changes_no_gradient(cfg):
    grads = []
    for on in (False, True):
        model = build(cfg).train()
        model.vision.grad_checkpointing = model.decoder.grad_checkpointing = on
        images, ids = some(cfg)
        model(images, ids, ids, return_logits=False)[1].backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    close(*grads, 1e-6)

# 3-5 eye, joint, mouth, against other implementations -------------------------------------------------------

def put(target, **parts):
    """Copies tensors into parameters by name, and checks that every parameter was given."""
    own = dict(target.named_parameters())
    assert set(own) == set(parts), set(own) ^ set(parts)
    with torch.no_grad():
        for name, value in parts.items():
            assert own[name].shape == value.shape, name
            own[name].copy_(value)

def block_parts(i, norm1, norm2, q, k, v, out, up, down, gate=None, both=('weight', 'bias')):
    """Our names for a block of another implementation, given as its modules."""
    parts = {}
    for w in both:
        get = lambda m: getattr(m, w)
        parts |= {f'blocks.{i}.norm1.{w}': get(norm1), f'blocks.{i}.norm2.{w}': get(norm2),
                  f'blocks.{i}.attn.q.{w}': get(q), f'blocks.{i}.attn.kv.{w}': torch.cat([get(k), get(v)]),
                  f'blocks.{i}.attn.out.{w}': get(out), f'blocks.{i}.mlp.down.{w}': get(down),
                  f'blocks.{i}.mlp.up.{w}': get(up) if gate is None else torch.cat([get(gate), get(up)])}
    return parts

class Part:
    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias

def test_vision_encoder_equals_torchvisions_vit():
    from torchvision.models import VisionTransformer
    torch.manual_seed(0)
    ref = VisionTransformer(32, 8, 2, 4, 32, 64).eval()
    eye = vlm.VisionEncoder(replace(CFG, class_token=True, vision=replace(EYE, n_hidden=64)))
    torch.nn.init.normal_(ref.class_token)
    parts = dict(class_token=ref.class_token, position=ref.encoder.pos_embedding[0])
    parts |= {f'stem.{w}': getattr(ref.conv_proj, w) for w in ('weight', 'bias')}
    parts |= {f'norm.{w}': getattr(ref.encoder.ln, w) for w in ('weight', 'bias')}
    for i, layer in enumerate(ref.encoder.layers):
        a = layer.self_attention
        q, k, v = map(Part, a.in_proj_weight.chunk(3), a.in_proj_bias.chunk(3))
        parts |= block_parts(i, layer.ln_1, layer.ln_2, q, k, v, a.out_proj, layer.mlp[0], layer.mlp[3])
    put(eye, **parts)
    images = torch.randn(2, 3, 32, 32)
    x = ref._process_input(images)
    close(eye(images), ref.encoder(torch.cat([ref.class_token.expand(2, -1, -1), x], 1))[:, 1:])

def test_vision_encoder_equals_transformers_siglip():
    tf = pytest.importorskip('transformers')
    torch.manual_seed(0)
    ref = tf.SiglipVisionModel(tf.SiglipVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                                     num_attention_heads=4, image_size=32, patch_size=8)).eval()
    core = getattr(ref, 'vision_model', ref)
    eye = vlm.VisionEncoder(replace(CFG, vision=replace(EYE, n_hidden=64, activation='gelu_tanh')))
    parts = dict(position=core.embeddings.position_embedding.weight)
    parts |= {f'stem.{w}': getattr(core.embeddings.patch_embedding, w) for w in ('weight', 'bias')}
    parts |= {f'norm.{w}': getattr(core.post_layernorm, w) for w in ('weight', 'bias')}
    for i, layer in enumerate(core.encoder.layers):
        a = layer.self_attn
        parts |= block_parts(i, layer.layer_norm1, layer.layer_norm2, a.q_proj, a.k_proj, a.v_proj, a.out_proj,
                             layer.mlp.fc1, layer.mlp.fc2)
    put(eye, **parts)
    images = torch.randn(2, 3, 32, 32)
    close(eye(images), ref(images).last_hidden_state)

def test_language_model_equals_transformers_llama_with_grouped_heads():
    tf = pytest.importorskip('transformers')
    torch.manual_seed(0)
    ref = tf.LlamaForCausalLM(tf.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True)).eval()
    model = build(CFG)
    parts = {'embedding.weight': ref.model.embed_tokens.weight, 'norm.weight': ref.model.norm.weight}
    for i, layer in enumerate(ref.model.layers):
        a, m = layer.self_attn, layer.mlp
        parts |= block_parts(i, layer.input_layernorm, layer.post_attention_layernorm, a.q_proj, a.k_proj, a.v_proj,
                             a.o_proj, m.up_proj, m.down_proj, m.gate_proj, both=('weight',))
    put(model.decoder, **parts)
    ids = torch.randint(0, 300, (2, 20))
    close(model(None, ids)[0], ref(ids).logits)
    theirs = ref.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model.generate(None, ids, max_new_tokens=30, temperature=0), theirs)

def test_language_model_equals_transformers_gpt2():
    tf = pytest.importorskip('transformers')
    torch.manual_seed(0)
    ref = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()
    model = build(replace(CFG, text=replace(EYE, norm_eps=1e-5, activation='gelu_tanh')))
    core = ref.transformer
    parts = {'embedding.weight': core.wte.weight, 'position': core.wpe.weight}
    parts |= {f'norm.{w}': getattr(core.ln_f, w) for w in ('weight', 'bias')}
    for i, b in enumerate(core.h):
        q, k, v = map(Part, b.attn.c_attn.weight.T.chunk(3), b.attn.c_attn.bias.chunk(3))
        out, up, down = (Part(m.weight.T, m.bias) for m in (b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj))
        parts |= block_parts(i, b.ln_1, b.ln_2, q, k, v, out, up, down)
    put(model.decoder, **parts)
    ids = torch.randint(0, 300, (2, 20))
    close(model(None, ids)[0], ref(ids).logits)

def test_resnet_encoder_equals_torchvisions_feature_map():
    import torchvision
    torch.manual_seed(0)
    ref, eye = torchvision.models.resnet18(weights=None).eval(), vlm.ResNetEncoder(KINDS['resnet']).eval()
    eye.load_state_dict({k: v for k, v in ref.state_dict().items() if not k.startswith('fc')})
    images = torch.randn(2, 3, 64, 64)
    seen = {}
    ref.layer4.register_forward_hook(lambda m, i, out: seen.update(out=out))
    ref(images)
    close(eye(images), seen['out'].flatten(2).mT, 1e-5)

def test_pixel_shuffle_takes_rows_then_columns_then_channels():
    joint = vlm.MultimodalProjection(CFG, 32)
    joint.proj = torch.nn.Identity()
    x = torch.arange(16 * 32.0).view(1, 4, 4, 32)
    want = torch.stack([torch.cat([x[0, 2 * r, 2 * c], x[0, 2 * r, 2 * c + 1], x[0, 2 * r + 1, 2 * c],
                                   x[0, 2 * r + 1, 2 * c + 1]]) for r in range(2) for c in range(2)])
    assert torch.equal(joint(x.view(1, 16, 32))[0], want)

# 6 the whole model ------------------------------------------------------------------------------------------

def test_loss_is_that_of_predicting_each_token_from_what_is_before_it(cfg):
    """The slow way: a pass for each scored token over the image and the tokens before it, nothing else."""
    model, (images, ids) = build(cfg), some(cfg)
    targets = ids.clone()
    targets[0, :3], targets[1, 5:] = -100, -100
    logits, loss = model(images, ids, targets)
    slow = []
    for b in range(3):
        for t in range(7):
            if targets[b, t] != -100:
                h, _ = model.hidden(images[b], ids[b:b + 1, :t])
                slow.append(-model.decoder.head(h[0, -1]).log_softmax(-1)[ids[b, t]])
    close(loss, torch.stack(slow).mean(), 1e-4)
    assert logits.shape == (3, 7, cfg.vocab_size)
    close(F.cross_entropy(logits[2, :-1], ids[2, 1:]), torch.stack(slow[-6:]).mean(), 1e-4)

def test_text_sees_the_image_and_the_past_but_not_the_future(cfg):
    model, (images, ids) = build(cfg), some(cfg)
    logits, _ = model(images, ids)
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % cfg.vocab_size
    other, _ = model(images, changed)
    assert torch.equal(logits[:, :4], other[:, :4]) and not torch.allclose(logits[:, 4:], other[:, 4:])
    assert (model(images.roll(1, 0), ids)[0] - logits).abs().max() > 1e-4
    close(model(images, F.pad(ids, (0, 5)))[0][:, :7], logits, 1e-5)       # padding on the right is not seen
    close(model(images[1], ids[1])[0][0], logits[1], 1e-5)                 # nor is the rest of the batch

def test_generation_is_the_same_with_and_without_cache_in_batches_and_alone(cfg):
    model, (images, ids) = build(cfg), some(cfg)
    plain = model.generate(images, ids, max_new_tokens=12, temperature=0)
    assert torch.equal(plain, model.generate(images, ids, max_new_tokens=12, temperature=0, use_cache=False))
    for t in range(12):                                                    # and it is what forward says
        assert torch.equal(model(images, plain[:, :7 + t])[0][:, -1].argmax(-1), plain[:, 7 + t])
    stop = int(plain[0, 9])
    prompts = [ids[0], ids[1, :0], ids[2, :4]]
    for use_cache in (True, False):
        rows = model.generate(images, prompts, max_new_tokens=12, temperature=0, stop=stop, use_cache=use_cache)
        for i, row in enumerate(rows):
            alone = model.generate(images[i], prompts[i], max_new_tokens=12, temperature=0, stop=stop)
            assert torch.equal(row, alone[0])
    assert rows[0][-1] == stop and len(rows[0]) <= 10

def test_generate_shares_one_image_among_samples_and_leaves_the_mode_alone():
    model, (images, ids) = build(CFG).train(), some(CFG)
    torch.manual_seed(0)
    out = model.generate(images[0], ids[0], max_new_tokens=6, num_samples=5)
    assert out.shape == (5, 13) and len({tuple(r) for r in out.tolist()}) > 1 and model.training
    greedy = model.generate(images[:2], ids[:2], max_new_tokens=6, num_samples=2, temperature=0)
    assert torch.equal(greedy[::2], greedy[1::2]) and not torch.equal(greedy[0], greedy[2])
    assert torch.equal(greedy[::2], model.eval().generate(images[:2], ids[:2], max_new_tokens=6, temperature=0))
    long = model.generate(images[0], ids[0], max_new_tokens=999)
    assert long.size(1) == CFG.block_size - CFG.n_visual
    assert model.generate(images[0], ids[0], max_new_tokens=0).shape == (1, 7)
    with pytest.raises(UserError, match='block_size=64'):
        model.generate(images[0], torch.zeros(70, dtype=torch.long))
    with pytest.raises(UserError, match='at least 1'):
        model.generate(None, ids[0, :0])

def test_score_is_the_sum_of_log_probabilities():
    model, (images, ids) = build(CFG), some(CFG)
    scores = model.score(images[0], ids[0, :3], [ids[1], ids[2, :2]])
    for score, choice in zip(scores, (ids[1], ids[2, :2])):
        whole = torch.cat([ids[0, :3], choice])
        targets = torch.cat([torch.full((3,), -100), choice])
        close(score, -model(images[0], whole, targets)[1] * len(choice), 1e-4)

def test_tiny_overfits_one_batch_with_adamw():
    cfg = replace(PRESETS['tiny'], vocab_size=257, block_size=150)
    torch.manual_seed(0)
    model, tok = MinimalVLM(cfg), Tokenizer.make('bytes')
    batch = collate([Shapes('train')[i] for i in range(4)], cfg, tok, image_transform(cfg))
    opt = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(150):
        loss = model(*batch, return_logits=False)[1]
        opt.zero_grad()
        loss.backward()
        opt.step()
        if loss < 0.04:
            break
    assert loss < 0.05, loss

# 7 sampling -------------------------------------------------------------------------------------------------

def draws(logits, n=4000, **options):
    torch.manual_seed(0)
    return Counter(sample_top_p(torch.tensor(logits).log().expand(n, -1), **options).flatten().tolist())

def test_top_p_keeps_the_token_that_crosses_p_and_no_more():
    """Of 0.5, 0.3, 0.15, 0.05: p = 0.6 needs the first two, p = 0.5 only the first, p = 0.81 the first three."""
    probs = [0.15, 0.5, 0.05, 0.3]
    assert set(draws(probs, p=0.6)) == {1, 3}
    assert set(draws(probs, p=0.49)) == {1} == set(draws(probs, p=1e-9))
    assert set(draws(probs, p=0.81)) == {0, 1, 3}
    assert set(draws(probs, p=1.0)) == {0, 1, 2, 3}
    assert abs(draws(probs, p=0.6)[1] / 4000 - 0.5 / 0.8) < 0.03
    assert set(draws(probs, p=1.0, top_k=2)) == {1, 3}

def test_temperature_comes_before_top_p_and_zero_is_greedy():
    probs = [0.5, 0.3, 0.2]
    assert set(draws(probs, p=0.75, temperature=0.3)) == {0}               # sharpened, the first holds 0.82
    assert set(draws(probs, p=0.75, temperature=9.0)) == {0, 1, 2}         # flattened, two do not reach 0.75
    assert set(draws(probs, temperature=0)) == {0} == set(draws(probs, temperature=1e-8))
    rows = sample_top_p(torch.tensor([[0.0, 9, 0], [9, 0, 0]]), p=0.5)
    assert rows.tolist() == [[1], [0]] and sample_top_p(torch.tensor([0.0, 9, 0]), p=0.5).tolist() == [1]
    for wrong in (dict(p=0), dict(p=2), dict(temperature=-1), dict(top_k=-1)):
        with pytest.raises(UserError):
            sample_top_p(torch.zeros(3), **wrong)

# 8 checkpoints ----------------------------------------------------------------------------------------------

def test_a_checkpoint_gives_back_model_tokenizer_and_extras(tmp_path, cfg):
    model, tok = build(cfg), Tokenizer.make('bpe', ['a small red cat, a red hat'] * 3, 300)
    save_checkpoint(f'{tmp_path}/c.pt', model, tok, step=7)
    again, checkpoint = load_checkpoint(f'{tmp_path}/c.pt')
    assert again.cfg == cfg and checkpoint['step'] == 7
    assert checkpoint['tokenizer'].encode('a red hat') == tok.encode('a red hat')
    images, ids = some(cfg)
    assert torch.equal(again.eval()(images, ids)[0], model(images, ids)[0])

def test_damaged_foreign_and_hostile_checkpoints_are_refused_in_one_line(tmp_path):
    path = f'{tmp_path}/c.pt'
    with pytest.raises(UserError, match='train.py'):
        load_checkpoint(path)
    save_checkpoint(path, build(CFG), Tokenizer.make('bytes'))
    whole = open(path, 'rb').read()

    class Evil:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/executed',)
    torch.save({'model': Evil()}, f'{tmp_path}/evil.pt')
    evil = open(f'{tmp_path}/evil.pt', 'rb').read()
    torch.save({'some': 'thing'}, f'{tmp_path}/foreign.pt')
    for content in (whole[:len(whole) // 2], b'', b'hello', evil, open(f'{tmp_path}/foreign.pt', 'rb').read()):
        open(path, 'wb').write(content)
        with pytest.raises(UserError, match='damaged') as e:
            load_checkpoint(path)
        assert '\n' not in str(e.value) and path in str(e.value)
    assert not os.path.exists(f'{tmp_path}/executed')

def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path, tok = f'{tmp_path}/c.pt', Tokenizer.make('bytes')
    save_checkpoint(path, build(CFG), tok, step=1)
    def full(*args):
        args[1].write(b'half of it')
        raise OSError('No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(UserError, match='No space left'):
        save_checkpoint(path, build(CFG), tok, step=2)
    assert load_checkpoint(path)[1]['step'] == 1

# 9 text and pixels ------------------------------------------------------------------------------------------

WORDS = ['a small red cat sits on a red mat', 'the cat sat, the mat sat', 'two cats and 12 hats, naïve café 😀']

def random_strings(n):
    rng = random.Random(0)
    ranges = [(32, 127), (160, 0x250), (0x4e00, 0x4f00), (0x1f600, 0x1f640), (9, 14), (48, 58)]
    return [''.join(chr(rng.randint(a, b - 1)) for a, b in rng.choices(ranges, k=rng.randint(0, 30))) for _ in range(n)]

@pytest.mark.parametrize('name', ['bytes', 'bpe'])
def test_tokenizers_give_any_text_back_also_from_their_state(name):
    tok = Tokenizer.make(name, WORDS * 2, 300)
    again = Tokenizer(**json.loads(json.dumps(tok.state)))
    for text in random_strings(500) + WORDS + ['<|endoftext|>']:
        ids = tok.encode(text)
        assert tok.decode(ids) == text and again.encode(text) == ids and tok.eos not in ids
    assert tok.decode([tok.eos]) == '' and max(tok.eos + 1, 257) == tok.n_vocab

def test_learned_bpe_equals_the_slow_way():
    """Recounting all pairs of all words before each merge; where counts tie, any of the best is right."""
    words = Counter(w for t in WORDS * 2 for w in re.findall(r' ?[^\W\d_]+|\d| ?(?:[^\w\s]|_)+|\s+', ' ' + t))
    parts = {w: list(w.encode().decode('latin-1')) for w in words}
    learned = [t for t, rank in sorted(vlm.learn_bpe(WORDS * 2, 320).items(), key=lambda item: item[1]) if rank > 255]
    assert len(learned) > 30 and ' cat' in learned
    for token in learned:
        pairs = Counter()
        for w, p in parts.items():
            for pair in zip(p, p[1:]):
                pairs[pair] += words[w]
        best = [pair for pair in pairs if ''.join(pair) == token]
        assert best and pairs[best[0]] == max(pairs.values())
        for w, p in parts.items():
            i = 0
            while i < len(p) - 1:
                p[i:i + 2] = [token] if (p[i], p[i + 1]) == best[0] else p[i:i + 2]
                i += 1

def test_streamed_text_never_breaks_a_character():
    tok = Tokenizer.make('bytes')
    pieces = list(tok.stream(tok.encode('é😀!')))
    assert ''.join(pieces) == 'é😀!' and '�' not in ''.join(pieces) and '' in pieces
    assert tok.decode(tok.encode('😀')[:2]) == '�' and tok.decode([99999]) == ''

def test_gpt2_tokenizer_offline_says_what_to_do(monkeypatch):
    def offline(name):
        raise ConnectionError('no route')
    monkeypatch.setattr(vlm.tiktoken, 'get_encoding', offline)
    with pytest.raises(UserError, match='--tokenizer=bpe'):
        Tokenizer.make('gpt2')

def test_every_kind_of_image_becomes_upright_8_bit_rgb():
    """A picture whose top half is white and bottom half black, in many modes, must come out so."""
    base = Image.new('L', (8, 8), 0)
    base.paste(255, (0, 0, 8, 4))
    deep = Image.frombytes('I;16', (8, 8), b'\xff\xff' * 32 + b'\x00\x00' * 32)
    clear = Image.new('RGBA', (8, 8), (0, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 8, 4))
    turned = base.rotate(180)
    turned.getexif()[274] = 3
    pictures = dict(grey=base, rgb=base.convert('RGB'), cmyk=base.convert('RGB').convert('CMYK'), palette=base.convert('P'),
                    one_bit=base.convert('1'), deep=deep, int32=base.convert('I'), alpha=clear, exif=turned,
                    la=Image.merge('LA', [base, Image.new('L', (8, 8), 255)]), float=base.convert('F'))
    for name, picture in pictures.items():
        rgb = vlm.to_rgb(picture)
        assert rgb.mode == 'RGB' and rgb.size == (8, 8)
        assert rgb.getpixel((4, 1)) == (255,) * 3 and rgb.getpixel((4, 6)) == (0,) * 3, (name, rgb.getpixel((4, 1)))
    half = Image.frombytes('I;16', (1, 1), (32768).to_bytes(2, 'little'))
    assert abs(vlm.to_rgb(half).getpixel((0, 0))[0] - 127) <= 1            # scaled, not clipped

def test_pixels_are_normalised_as_the_config_says():
    from torchvision.transforms import functional as TF
    cfg = replace(CFG, image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 0.6, 0.7), image_resize='crop')
    picture = Image.effect_noise((60, 40), 90).convert('RGB')
    pixels, model = image_transform(cfg)(picture), build(cfg)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 32, 32)
    want = TF.normalize(pixels.float() / 255, cfg.image_mean, cfg.image_std)
    close(model.see(pixels), model.see(want), 1e-6)
    close(pixels.float(), TF.center_crop(TF.pil_to_tensor(TF.resize(picture, 32)).float(), 32), 2.0)

@pytest.mark.skipif(not os.path.isdir(f'{DATA}/odd_images'), reason='needs ../shared/data/odd_images')
def test_awkward_files_are_read_or_refused_by_name():
    with open(f'{DATA}/odd_images/manifest.csv', newline='') as f:
        for row in csv.DictReader(f):
            path = f"{DATA}/odd_images/{row['file']}"
            try:
                image_transform(CFG)(open_image(path, 32))
                readable = True
            except UserError as e:
                assert row['file'] in str(e) and '\n' not in str(e)
                readable = False
            assert readable or row['pillow_opens'] != 'ok' or 'bomb' in row['file'], row

def test_a_batch_is_padded_on_the_right_and_scored_on_answers_only():
    tok, items = Tokenizer.make('bytes'), [(Image.new('RGB', (9, 9)), 'q?', 'yes'), (Image.new('RGB', (9, 9)), '', 'no')]
    images, ids, targets = collate(items, CFG, tok, image_transform(CFG))
    assert images.shape == (2, 3, 32, 32)
    assert ids.tolist() == [[*b'q? yes', 256], [*b' no', 256, 0, 0, 0]]
    assert targets.tolist() == [[-100, -100, *b' yes', 256], [*b' no', 256, -100, -100, -100]]

# 10 data ----------------------------------------------------------------------------------------------------

def test_scenes_come_from_seed_split_and_index_and_keep_unseen_pairs_out_of_training():
    a, b = Shapes('train', 1), Shapes('train', 1)
    assert a[5][1:] == b[5][1:] and a[5][0].tobytes() == b[5][0].tobytes()
    assert a[5][0].tobytes() != Shapes('train', 2)[5][0].tobytes() != Shapes('val', 1)[5][0].tobytes()
    assert len(vlm.UNSEEN) >= 6 and len(vlm.COLORS) >= 8 and len(vlm.SHAPES) >= 6
    for split in ('train', 'val'):
        text = ' '.join(' '.join(Shapes(split, 3)[i][1:]) for i in range(600))
        assert not [pair for pair in vlm.UNSEEN if pair in text]
    for i in range(100):
        said = Shapes('novel', 3, 'caption')[i][2]
        assert len(re.findall('|'.join(vlm.UNSEEN), said)) == len(re.findall('small|large', said)) in (1, 2, 3)

def test_captions_tell_what_is_drawn():
    """An oracle of its own: where a thing is said to be, the picture has about its colour, and no other thing."""
    centers = {p: (0.21 + 0.29 * (i % 3), 0.21 + 0.29 * (i // 3)) for i, p in enumerate(vlm.PLACES)}
    for i in range(200):
        image, _, text = Shapes('val', 5, 'caption', pixels=200)[i]
        said = re.findall(r'a (small|large) (\w+) (\w+) ((?:at|on|in) the (?:top|bottom|left|right|center| )+)', text)
        places = [place.strip() for *_, place in said]
        assert places and sorted(places, key=vlm.PLACES.index) == places
        for place, (x, y) in centers.items():
            seen = image.getpixel((int(200 * x), int(200 * y)))
            named = [color for _, color, _, p in said if p.strip() == place]
            if named:
                assert max(abs(a - b) for a, b in zip(seen, vlm.COLORS[named[0]])) < 30, text
            else:
                assert min(seen) > 200 or len(said) > 1, text

def test_answers_to_questions_agree_with_the_caption_of_the_scene():
    for i in range(400):
        data = Shapes('train', 9, vlm.QUESTIONS[i % len(vlm.QUESTIONS)])
        rng = random.Random(i)
        scene = data.scene(rng)
        qa = data.ask(data.kind, scene, rng)
        if qa is None:
            continue
        question, answer = qa
        things = re.findall(r'(?:small|large) (\w+ \w+)', data.ask('caption', scene, rng)[1])
        if data.kind == 'count':
            what = re.search(r'(\w+)\?', question)[1]
            n = len(things) if what == 'there' else sum(what in thing for thing in things)
            assert answer == ['zero', 'one', 'two', 'three'][n]
        elif data.kind == 'exists':
            assert (answer == 'yes') == (re.search(r'there an? (\w+ \w+)', question)[1] in things)
        elif data.kind == 'choice':
            assert [o for o in re.findall(r'(\w+ \w+)(?=,| or|\?)', question.split(': ')[1]) if o in things] == [answer]
        elif data.kind in ('color', 'shape'):
            named = re.search(r'is the (\w+)', question)[1]
            assert [t for t in things if named in t][0].replace(named, '').strip() == answer

def photos(folder, n):
    os.makedirs(folder, exist_ok=True)
    for i in range(n):
        Image.new('RGB', (40, 30), (i, 0, 0)).save(f'{folder}/{i}.png')

def test_every_caption_format_gives_the_same_items(tmp_path):
    photos(f'{tmp_path}/images', 4)
    def write(name, text):
        with open(f'{tmp_path}/{name}', 'w') as f:
            f.write(text)
        data = make_dataset(f'{tmp_path}/{name}', 'val', val_spec=f'{tmp_path}/{name}')
        return sorted((image.getpixel((0, 0))[0], prompt, answer) for image, prompt, answer in (data[i] for i in range(len(data))))
    want = [(i, '', f'photo, number {i}') for i in range(4)]
    rows = [{'image': f'{i}.png', 'caption': f'photo, number {i}'} for i in range(4)]
    assert write('a.csv', 'image,caption\n' + ''.join(f'{i}.png,"photo, number {i}"\n' for i in range(4))) == want
    assert write('a.jsonl', '\n'.join(map(json.dumps, rows))) == want
    assert write('a.json', json.dumps({'images': [{'id': i, 'file_name': f'{i}.png'} for i in range(4)], 'annotations': [
        {'image_id': i, 'caption': row['caption']} for i, row in enumerate(rows)]})) == want
    qa = [(i, f'{w}?', f'{w} {i}') for i in range(4) for w in ('who', 'why')]
    talk = [[{'from': 'human', 'value': '<image>\nwho?'}, {'from': 'gpt', 'value': f'who {i}'},
             {'from': 'human', 'value': 'why?'}, {'from': 'gpt', 'value': f'why {i}'}] for i in range(4)]
    assert write('b.json', json.dumps([{'image': f'{i}.png', 'conversations': t} for i, t in enumerate(talk)])) == qa
    assert write('b.jsonl', '\n'.join(json.dumps(dict(image=f'{i}.png', prompt=q, answer=a)) for i, q, a in qa)) == qa

def test_a_folder_of_class_folders_and_the_split_by_image(tmp_path):
    for name in ('cat', 'sea_horse'):
        photos(f'{tmp_path}/{name}', 30)
    train, val = (make_dataset(str(tmp_path), split) for split in ('train', 'val'))
    assert (len(train), len(val)) == (57, 3) and not set(train.names) & set(val.names)
    assert {train[i][1:] for i in range(57)} == {('what is this?', 'cat'), ('what is this?', 'sea horse')}
    with open(f'{tmp_path}/c.csv', 'w') as f:
        f.write('image,caption\n' + ''.join(f'cat/{i % 30}.png,say {i}\n' for i in range(90)))
    train, val = (make_dataset(f'{tmp_path}/c.csv', split) for split in ('train', 'val'))
    assert len(train) + len(val) == 90 and len(val) == 3 and not set(train.names) & set(val.names)

def test_bad_rows_and_images_are_named_and_do_not_stop_a_run(tmp_path, capfd):
    photos(tmp_path, 3)
    open(f'{tmp_path}/1.png', 'wb').write(b'not a picture')
    with open(f'{tmp_path}/c.csv', 'w') as f:
        f.write('image,caption\n' + ''.join(f'{i}.png,say {i}\n' for i in (0, 1, 2, 7)))
    data = make_dataset(f'{tmp_path}/c.csv', 'val', val_spec=f'{tmp_path}/c.csv')
    assert 'WARNING' in (err := capfd.readouterr().err) and '1 of 4' in err and '7.png' in err
    assert [data[i][2] for i in (0, 1, 2, 1)] == ['say 0', 'say 2', 'say 2', 'say 2'] and int(data.bad.sum()) == 1
    assert capfd.readouterr().err.count('skipped: ') == 1
    def refuse(text, match, name='d.csv'):
        with open(f'{tmp_path}/{name}', 'w') as f:
            f.write(text)
        with pytest.raises(UserError, match=match):
            make_dataset(f'{tmp_path}/{name}', 'train')
    refuse('picture,text\n0.png,x\n', 'row 1: wanted image and caption')
    refuse('image,caption\nx.png,a\ny.png,b\n', 'names 2 images, and none is in')
    refuse('{"image": "0.png"}', 'row 1: wanted', 'd.jsonl')
    refuse('{"image": "0.png"', 'not a caption file', 'd.jsonl')
    refuse('image,caption\n0.png,a\n', 'too few')
    refuse('{"images": []}', 'annotations', 'd.json')
    with pytest.raises(UserError, match='neither'):
        make_dataset(f'{tmp_path}/nothing.csv')

@pytest.mark.skipif(not os.path.isdir(f'{DATA}/coco_captions'), reason='needs ../shared/data/coco_captions')
def test_a_set_without_a_single_image_is_one_error(capfd):
    with pytest.raises(UserError, match='none is in'):
        make_dataset(f'{DATA}/coco_captions/captions_val2017_800.json')
    assert capfd.readouterr().err == ''

# 11 command line, and the runners ---------------------------------------------------------------------------

def test_wrong_settings_are_one_line_that_helps(capsys):
    with open(f'{HERE}/train.py') as f:
        names = re.findall(r'^(\w+) = (.*?)  +# ', f.read(), re.M)
    def call(*argv):
        settings = dict({k: ast.literal_eval(v) for k, v in names}, __file__=f'{HERE}/train.py', __doc__='')
        vlm.override(settings, list(argv))
        return settings
    good = call('--batch_size=32', '--learning_rate', '1', '--compile', '--augment=false', '--dataset=my.csv')
    assert (good['batch_size'], good['learning_rate'], good['compile'], good['augment']) == (32, 1.0, True, False)
    assert isinstance(good['learning_rate'], float)
    for argv, words in {'--bach_size=32': 'did you mean --batch_size', '--max_iters=ten': "'ten' is not a whole number",
                        '--batch_size=0': 'as asked for: > 0', '--optimizer=sgd': 'muon', '--beta1=1': 'and < 1',
                        '--learning_rate=nan': '> 0', '--compile=maybe': 'true or false', 'x': 'no setting x',
                        '--seed=1.5': 'whole number', '--min_lr=-0.1': '>= 0 and <= 1', '--out_dir': 'expected one'}.items():
        with pytest.raises(SystemExit) as stop:
            call(argv)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and words in err and err.count('\n') == 1, (argv, err)
    with pytest.raises(SystemExit) as stop:
        call('--help')
    out = capsys.readouterr().out
    assert stop.value.code == 0 and all(f'--{name}' in out for name, _ in names)

SMALL = ['--batch_size=8', '--eval_iters=1', '--eval_samples=4', '--final_samples=4', '--log_interval=1',
         '--lr_decay_iters=6', '--dtype=float32']

def losses(folder):
    with open(f'{folder}/log.csv') as f:
        return [row['loss'] for row in csv.DictReader(f) if row['loss']]

def test_a_resumed_run_equals_one_that_never_stopped(tmp_path):
    """Bit for bit, on the CPU: twice the same run, and one stopped in the middle by SIGTERM."""
    for name in 'ab':
        assert run('train.py', *SMALL, '--max_iters=6', f'--out_dir={name}', cwd=tmp_path).returncode == 0
    assert losses(f'{tmp_path}/a') == losses(f'{tmp_path}/b') and len(losses(f'{tmp_path}/a')) == 6
    long = subprocess.Popen([sys.executable, f'{HERE}/train.py', *SMALL, '--max_iters=6', '--out_dir=c'], cwd=tmp_path,
                            stdout=subprocess.PIPE, text=True, env={**os.environ, 'OMP_NUM_THREADS': '2'})
    for line in long.stdout:
        if line.startswith('step 3/6'):
            long.send_signal(signal.SIGTERM)
    assert long.wait() == 0
    resumed = run('train.py', '--init_from=resume', '--out_dir=c', cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(f'{tmp_path}/c') == losses(f'{tmp_path}/a')
    whole, again = (torch.load(f'{tmp_path}/{name}/ckpt.pt', weights_only=True)['model'] for name in 'ac')
    assert all(torch.equal(whole[k], again[k]) for k in whole)
    other = run('train.py', *SMALL, '--seed=2', '--out_dir=a', cwd=tmp_path)
    assert other.returncode == 1 and 'seed=1337' in other.stderr and other.stderr.count('\n') == 1

@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """A short run of the default job: a minute, not the whole."""
    folder = tmp_path_factory.mktemp('trained')
    done = run('train.py', '--max_iters=350', '--eval_samples=10', '--eval_iters=2', cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout

def test_the_default_job_learns_to_look(trained):
    """Of nothing but prompts and captions nothing can be known of a scene: the loss with swapped images is far worse."""
    folder, printed = trained
    assert float(re.search(r'image gain (-?[\d.]+)', printed)[1]) > 1.0
    assert os.path.getsize(f'{folder}/out/samples.png') > 10_000 and len(losses(f'{folder}/out')) == 7

def test_scenes_drawn_by_other_means_are_described_as_well(trained, tmp_path):
    """500 pixels, JPEG, other shades, other places within the cells, other drawing code: as many words right."""
    model, checkpoint = load_checkpoint(f'{trained[0]}/out/ckpt.pt')
    rng, tok, transform = random.Random(4), checkpoint['tokenizer'], image_transform(model.cfg)
    shades = dict(red='#d02030', green='#2f9e50', blue='#3050d8', yellow='#f0dc38', orange='#f08a20', purple='#9040b8',
                  cyan='#45c8dc', black='#2c2c2c')

    def paint(pen, shape, color, x, y, r):
        around = lambda degrees, far: (x + far * r * math.sin(math.radians(degrees)), y - far * r * math.cos(math.radians(degrees)))
        if shape == 'circle':
            pen.ellipse((x - r, y - r, x + r, y + r), color)
        elif shape == 'square':
            pen.rectangle((x - 0.82 * r, y - 0.82 * r, x + 0.82 * r, y + 0.82 * r), color)
        elif shape == 'cross':
            pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), color)
            pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), color)
        else:
            pen.polygon({'triangle': [around(d, 1) for d in (0, 120, 240)],
                         'diamond': [around(0, 1.1), around(90, 0.7), around(180, 1.1), around(270, 0.7)],
                         'star': [around(36 * i, 0.43 if i % 2 else 1.05) for i in range(10)]}[shape], color)

    ours, theirs = [], []
    for i in range(150):
        own = Shapes('val', 11, 'caption')[i]
        ours.append((transform(own[0]), own[2]))
        pairs, cell = Shapes('val').pairs, rng.randrange(9)
        picture, words = Image.new('RGB', (500, 500), (238, 240, 235)), []
        for place in sorted({cell, (cell + rng.choice((2, 4, 5))) % 9}):
            color, shape = rng.choice(pairs).split()
            size, r = rng.choice((('small', 53), ('large', 83)))
            x, y = (500 * (0.21 + 0.29 * c) + rng.randint(-17, 17) for c in (place % 3, place // 3))
            paint(ImageDraw.Draw(picture), shape, shades[color], x, y, r)
            words.append(f'a {size} {color} {shape} {vlm.PLACES[place]}')
        picture.save(f'{tmp_path}/scene.jpg', quality=80)
        theirs.append((transform(open_image(f'{tmp_path}/scene.jpg')), ' and '.join(words)))

    def right_words(scenes):
        prompts = [torch.zeros(0, dtype=torch.long)] * len(scenes)
        rows = model.generate(torch.stack([pixels for pixels, _ in scenes]), prompts, temperature=0, stop=tok.eos)
        pairs = [(tok.decode(row).split(), text.split()) for row, (_, text) in zip(rows, scenes)]
        return sum(a == b for said, text in pairs for a, b in zip(said, text)) / sum(len(text) for _, text in pairs)
    native, foreign = right_words(ours), right_words(theirs)
    assert native > 0.8 and foreign > native - 0.08, (native, foreign)

def test_sample_answers_ranks_and_goes_on_past_a_bad_picture(tmp_path):
    lost = run('sample.py', cwd=tmp_path)
    assert lost.returncode == 1 and 'python train.py' in lost.stderr and lost.stderr.count('\n') == 1
    os.makedirs(f'{tmp_path}/out')
    cfg, tok = replace(PRESETS['tiny'], vocab_size=257), Tokenizer.make('bytes')
    save_checkpoint(f'{tmp_path}/out/ckpt.pt', build(cfg), tok)
    Image.new('RGB', (50, 40), 'red').save(f'{tmp_path}/red.png')
    open(f'{tmp_path}/bad.png', 'wb').write(b'x')
    alone = run('sample.py', '--max_new_tokens=3', cwd=tmp_path)
    assert alone.returncode == 0 and os.path.exists(f'{tmp_path}/out/drawn.png') and 'tokens/s' in alone.stdout
    both = run('sample.py', '--image=bad.png,red.png', '--prompt=what?', '--choices=red,blue', cwd=tmp_path)
    assert both.returncode == 1 and 'bad.png' in both.stderr and both.stderr.count('\n') == 1
    shares = [float(x) for x in re.findall(r'([\d.]+)%  (?:red|blue)', both.stdout)]
    assert len(shares) == 2 and abs(sum(shares) - 100) < 0.2
