"""A minimal vision-language model: one file that turns an image and a question into words.

    image (3,H,W)                               "what color is the star?"
      | stem: cut into patches, or convolve                | tokenizer
      | VisionEncoder: each patch looks at all             |
      | MultimodalProjection: to the decoder's width       | embedding
    [ v1 v2 ... vN ][ t1 t2 ... tT ]   one sequence: visual tokens first, then text
                   | LanguageDecoder: each token looks at itself and at what is before it
    logits over the vocabulary -> sample_top_p -> the next token, again and again: "red"
Contents: 1 config, 2 blocks, 3 vision encoder, 4 projection, 5 decoder, 6 model, 7 sampling, 8 weights, 9
text and pixels, 10 data, 11 command line. One Attention, MLP and Block serve both stacks: ViT, SigLIP, GPT-2,
Llama differ in a TransformerConfig. Left out: beams, tiles. Letters: B batch, T text or queries, N visual
tokens, S sequence or keys, C channels, H heads, K key/value heads, D channels a head, V vocabulary. arXiv:
ViT 2010.11929, SigLIP 2303.15343, LLaVA 2304.08485, Flamingo 2204.14198, Llama 2302.13971, RoPE 2104.09864.
"""
import argparse, codecs, contextlib, csv, difflib, itertools, json, math, mmap, os, random, re, sys, warnings
from typing import Literal, get_args
from collections import ChainMap, Counter, OrderedDict, defaultdict, namedtuple
from dataclasses import asdict, dataclass, fields, replace
import tiktoken, torch, torchvision, torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torchvision.transforms.v2 import ColorJitter, RandomHorizontalFlip, RandomResizedCrop, functional as TF

class UserError(ValueError):
    """What a user typed, or a file holds, is wrong: the runners print one line, without a traceback."""

@contextlib.contextmanager
def explained(message, *kinds):
    """Turns what is raised, of these kinds or of any, into a UserError of one line: message and cause."""
    try: yield
    except kinds or Exception as e:      # hostile files make Pillow and pickle fail in any way there is
        raise UserError(f'{message} ({type(e).__name__}: {" ".join(str(e).split())[:300]})') from e
# 1. Config --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TransformerConfig:
    """One stack of blocks, the vision encoder's or the decoder's."""
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_kv_head: int = 0               # key/value heads; 0 = n_head, fewer = grouped-query attention
    n_hidden: int = 0                # width inside the MLP; 0 = 4 * n_embd
    norm: Literal['layer', 'rms'] = 'layer'
    norm_eps: float = 1e-6
    activation: Literal['gelu', 'gelu_tanh', 'swiglu'] = 'gelu'
    position: Literal['learned', 'rope'] = 'learned'
    rope_base: float = 10000.0
    bias: bool = True                # in linear layers and layer norms
    dropout: float = 0.0             # on what each attention and each MLP adds

@dataclass(frozen=True)
class VLMConfig:
    """Vision encoder, projection, decoder, and how the model wants its pixels and its prompts."""
    vision: TransformerConfig = TransformerConfig()
    text: TransformerConfig = TransformerConfig()
    encoder: Literal['vit', 'resnet18', 'resnet50'] = 'vit'
    stem: Literal['patch', 'conv'] = 'patch'     # one strided convolution; or several, with max-pooling
    image_size: int = 224            # pixels a side
    patch_size: int = 16             # pixels a side of a cell of the feature grid; a ResNet's are 32
    class_token: bool = False        # attended to, then dropped, as in the first ViT
    image_mean: tuple = (0.5, 0.5, 0.5)
    image_std: tuple = (0.5, 0.5, 0.5)
    image_resize: Literal['squash', 'crop'] = 'squash'   # all of it, its aspect ratio lost; or its centre
    projection: Literal['linear', 'mlp', 'pixel_shuffle', 'perceiver'] = 'mlp'
    projection_hidden: int = 2048    # 'mlp': its width
    shuffle_factor: int = 2          # 'pixel_shuffle': f x f cells become one visual token (space to depth)
    n_latents: int = 32              # 'perceiver': visual tokens it returns
    input_norm: bool = False         # normalise what enters the decoder: images and words on one scale
    vocab_size: int = 50257
    block_size: int = 1024           # longest sequence, visual tokens included
    tokenizer: str = 'gpt2'          # see Tokenizer.make
    prompt_template: str = '{}'      # how a prompt is put to the model
    caption_prompt: str = ''         # the prompt that asks for a caption
    cell = property(lambda c: c.patch_size if c.encoder == 'vit' else 32)
    grid = property(lambda c: c.image_size // c.cell)
    factor = property(lambda c: c.shuffle_factor if c.projection == 'pixel_shuffle' else 1)
    n_visual = property(lambda c: c.n_latents if c.projection == 'perceiver' else (c.grid // c.factor) ** 2)
    longest_prompt = property(lambda c: (c.block_size - c.n_visual) * 3 // 4)    # the rest is for the answer

    def __post_init__(self):
        for c in (self, self.vision, self.text):
            for f in fields(c):
                if (words := get_args(f.type)) and getattr(c, f.name) not in words:
                    raise UserError(f'{f.name}={getattr(c, f.name)}: wanted one of {", ".join(words)}')
            if c is not self and (c.n_embd % c.n_head or c.n_head % (c.n_kv_head or c.n_head)):
                raise UserError(f'n_head={c.n_head} must divide n_embd={c.n_embd}, and n_kv_head n_head')
        if self.image_size % (self.cell * self.factor) or self.block_size <= self.n_visual:
            raise UserError(f'{self.cell * self.factor} must divide image_size={self.image_size}, and '
                            f'block_size={self.block_size} exceed the {self.n_visual} tokens of an image')

SIGLIP = dict(vision=TransformerConfig(activation='gelu_tanh'), image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
gpt = lambda *size: dict(text=TransformerConfig(*size, norm_eps=1e-5, activation='gelu_tanh'))
llama = lambda tokenizer, *size: dict(vocab_size=49152, tokenizer=tokenizer, text=TransformerConfig(
    *size, norm='rms', norm_eps=1e-5, activation='swiglu', position='rope', rope_base=100000.0, bias=False))
IMAGENET = dict(image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225), image_resize='crop')
SMOLLM2 = llama('smollm2-135m', 30, 9, 576, 3, 1536)
NANOVLM = dict(SIGLIP | SMOLLM2, tokenizer='cosmo2', projection='pixel_shuffle', image_mean=(0.0,) * 3,
               image_std=(1.0,) * 3, caption_prompt='What is this?', prompt_template='Question: {} Answer:')
PUBLIC = {   # published weights: their Hugging Face repository, or '' for torchvision's, and what they are
    'vit_b_16': ('', dict(class_token=True, **IMAGENET)),
    **{name: ('', dict(encoder=name, **IMAGENET)) for name in ('resnet18', 'resnet50')},
    'siglip-b-16': ('google/siglip-base-patch16-224', SIGLIP),
    **{f'gpt2{size}': (f'openai-community/gpt2{size}', gpt(*numbers)) for size, *numbers in (
        ('', 12, 12, 768), ('-medium', 24, 16, 1024), ('-large', 36, 20, 1280), ('-xl', 48, 25, 1600))},
    'smollm2-135m': ('HuggingFaceTB/SmolLM2-135M', SMOLLM2),
    'smollm2-360m': ('HuggingFaceTB/SmolLM2-360M', llama('smollm2-360m', 32, 15, 960, 5, 2560)),
    'cosmo2': ('HuggingFaceTB/cosmo2-tokenizer', {}), 'nanovlm-222m': ('lusxvr/nanoVLM-222M', NANOVLM)}
SCRATCH = dict(stem='conv', patch_size=8, image_size=64, input_norm=True, projection='pixel_shuffle',
               tokenizer='bpe', prompt_template=' {}')     # a first word is the token it is later
slim = lambda n_layer, n_head, **more: TransformerConfig(n_layer, n_head, 128, bias=False, **more)
PRESETS = {  # from nothing on a CPU: drawn scenes (1.2M parameters), photos (1.7M); then 213M and 222M
    'tiny': VLMConfig(slim(1, 8), slim(4, 8), vocab_size=512, block_size=112, **SCRATCH),
    'small': VLMConfig(slim(1, 4, dropout=0.1), slim(4, 4, dropout=0.1), vocab_size=4096, block_size=160,
                       **SCRATCH),
    'base': VLMConfig(**PUBLIC['vit_b_16'][1], **PUBLIC['gpt2'][1]), 'nanovlm': VLMConfig(**NANOVLM)}
# 2. Building blocks -----------------------------------------------------------------------------------------
make_norm = lambda c: (nn.RMSNorm(c.n_embd, c.norm_eps) if c.norm == 'rms' else
                       nn.LayerNorm(c.n_embd, c.norm_eps, bias=c.bias))

def rotate(x, rope):
    """Turns each pair (i, i + D/2) of x (B,H,S,D) by its angle, so that q.k depends on distance alone."""
    (cos, sin), (a, b) = rope.to(x.dtype), x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

def attend(q, k, v, mask=None):
    """softmax(QK^T / sqrt(D)) V, spelled out: F.scaled_dot_product_attention, with the map that it hides.
    q (B,H,T,D), k and v (B,H,S,D), mask True where a query may attend -> y (B,H,T,D), att (B,H,T,S)."""
    att = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))        # (B,H,T,D) x (B,H,D,S) -> (B,H,T,S)
    if mask is not None: att = att.masked_fill(~mask, float('-inf'))
    att = att.softmax(dim=-1)
    return att @ v, att                                          # (B,H,T,S) x (B,H,S,D) -> (B,H,T,D)

class Attention(nn.Module):
    """Multi-head attention: self or cross, causal or not, with grouped key/value heads, RoPE, a KV cache."""
    def __init__(self, cfg, causal=False):
        super().__init__()
        self.n_head, self.n_kv_head, self.causal = cfg.n_head, cfg.n_kv_head or cfg.n_head, causal
        self.head_dim, self.maps = cfg.n_embd // cfg.n_head, None     # maps: a list collects each call's map
        self.q, self.out = (nn.Linear(cfg.n_embd, cfg.n_embd, cfg.bias) for _ in range(2))
        self.k, self.v = (nn.Linear(cfg.n_embd, self.n_kv_head * self.head_dim, cfg.bias) for _ in range(2))

    def forward(self, x, context=None, mask=None, rope=None, cache=None):
        """x (B,T,C) makes the queries, context (B,S,C) or x the keys and values; mask: see attend. -> (B,T,C)
        cache: (buffer (2,B,K,length,D), known): x's own go in at known, and x attends to all up to there."""
        B, T, C = x.shape
        context, D, groups = x if context is None else context, self.head_dim, self.n_head // self.n_kv_head
        q, k, v = (y.unflatten(-1, (-1, D)).transpose(1, 2)                      # (B,H,T,D), 2 x (B,K,S,D)
                   for y in (self.q(x), self.k(context), self.v(context)))
        if rope is not None: q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            kv, known = cache
            kv[0, :, :, known:known + T], kv[1, :, :, known:known + T] = k, v
            k, v = kv[:, :, :, :known + T]
        # backward in bf16, PyTorch's fused kernel for CPUs takes seven times as long as the spelled-out lines
        plain = self.maps is not None or q.is_cpu and q.dtype == torch.bfloat16 and q.requires_grad
        # is_causal lines up the first query with the first key: wrong behind a cache; one token sees all
        causal, S = self.causal and mask is None and T > 1, k.size(2)
        if causal and (plain or T < S): causal, mask = False, q.new_ones(T, S).tril(S - T).bool()
        if groups > 1 and (plain or mask is not None):   # fused kernels of GPUs take no groups with a mask
            k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
        if plain: y, att = attend(q, k, v, mask)
        else: y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=groups > 1)
        if self.maps is not None: self.maps.append(att)
        return self.out(y.transpose(1, 2).reshape(B, T, C))

class MLP(nn.Module):
    """Linear, activation, linear; in SwiGLU a third linear map, activated, gates the first."""
    def __init__(self, cfg):
        super().__init__()
        C, hidden, self.tanh = cfg.n_embd, cfg.n_hidden or 4 * cfg.n_embd, cfg.activation == 'gelu_tanh'
        self.up, self.down = nn.Linear(C, hidden, cfg.bias), nn.Linear(hidden, C, cfg.bias)
        self.gate = nn.Linear(C, hidden, cfg.bias) if cfg.activation == 'swiglu' else None

    def forward(self, x):
        if self.gate is not None: return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x), approximate='tanh' if self.tanh else 'none'))

class Block(nn.Module):
    """Pre-norm: the residual stream x is only ever added to."""
    def __init__(self, cfg, causal=False):
        super().__init__()
        self.norm1, self.attn = make_norm(cfg), Attention(cfg, causal)
        self.norm2, self.mlp, self.drop = make_norm(cfg), MLP(cfg), nn.Dropout(cfg.dropout)

    def forward(self, x, **options):
        x = x + self.drop(self.attn(self.norm1(x), **options))
        return x + self.drop(self.mlp(self.norm2(x)))

class Transformer(nn.Module):
    """Blocks and a last norm: what vision encoder, resampler and decoder have in common."""
    def __init__(self, cfg, causal=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(cfg, causal) for _ in range(cfg.n_layer))
        self.norm = make_norm(cfg)
        self.grad_checkpointing = False  # keep what enters each block, compute the rest again going backward

    def run(self, x, cache=None, **options):
        for i, block in enumerate(self.blocks):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, **options)
            else: x = block(x, cache=cache and (cache[0][i], cache[1]), **options)   # its layer's buffer
        return self.norm(x)
# 3. Vision encoder ------------------------------------------------------------------------------------------
def conv_stem(width, patch_size):
    """(B,3,h,w) -> (B,width,h/p,w/p), by log2(p) + 1 convolutions. Max-pooling keeps edges sharp."""
    if patch_size not in (4, 8, 16, 32): raise UserError(f'patch_size={patch_size}: wanted 4, 8, 16 or 32')
    widths = [width // 4] * (int(math.log2(patch_size)) - 1) + [width // 2]
    layers = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.GELU()]
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(b), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], width, 3, padding=1))

class VisionEncoder(Transformer):
    """ViT or SigLIP: an image becomes a grid of patches, and each patch looks at all."""
    def __init__(self, cfg):
        super().__init__(cfg.vision)
        self.width, p = cfg.vision.n_embd, cfg.patch_size
        self.stem = conv_stem(self.width, p) if cfg.stem == 'conv' else nn.Conv2d(3, self.width, p, stride=p)
        self.class_token = nn.Parameter(torch.zeros(1, 1, self.width)) if cfg.class_token else None
        self.position = nn.Parameter(torch.zeros(cfg.grid ** 2 + cfg.class_token, self.width))

    def forward(self, images):
        """images (B,3,H,W), normalised -> features (B,grid*grid,C), row by row."""
        patches = x = self.stem(images).flatten(2).mT                    # (B,C,h,w) -> (B,h*w,C)
        if self.class_token is not None: x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        return self.run(x + self.position)[:, -patches.size(1):]         # without the class token

class ResNetEncoder(nn.Sequential):
    """torchvision's ResNet up to its last feature map, as a grid of features (B,H/32*W/32,512 or 2048)."""
    def __init__(self, cfg):
        net = getattr(torchvision.models, cfg.encoder)(weights=None)
        super().__init__(OrderedDict(list(net.named_children())[:-2]))   # all but pooling and classifier
        self.width = net.fc.in_features
    forward = lambda self, images: super().forward(images).flatten(2).mT
# 4. Projection ----------------------------------------------------------------------------------------------
class MultimodalProjection(nn.Module):
    """Features (B,grid*grid,width) -> tokens (B,N,C) of the decoder's width; pixel shuffle joins cells."""
    def __init__(self, cfg, width):
        super().__init__()
        self.grid, self.factor, bias = cfg.grid, cfg.factor, cfg.projection != 'pixel_shuffle'
        d_in, d_out, inner = width * self.factor ** 2, cfg.text.n_embd, cfg.projection_hidden
        self.proj, self.resampler = nn.Linear(d_in, d_out, bias=bias), None
        if cfg.projection == 'mlp':              # LLaVA 1.5
            self.proj = nn.Sequential(nn.Linear(d_in, inner, bias), nn.GELU(), nn.Linear(inner, d_out, bias))
        if cfg.projection == 'perceiver':        # Flamingo: a few learned queries look at the features
            self.latents, self.norm = nn.Parameter(torch.zeros(cfg.n_latents, d_out)), make_norm(cfg.text)
            self.resampler = Transformer(replace(cfg.text, n_layer=2))

    def forward(self, x):
        (B, _, C), f, g = x.shape, self.factor, self.grid // self.factor
        x = self.proj(x.view(B, g, f, g, f, C).transpose(2, 3).reshape(B, g * g, f * f * C))
        if self.resampler is None: return x
        return self.resampler.run(self.latents.repeat(len(x), 1, 1), context=self.norm(x))
# 5. Language decoder ----------------------------------------------------------------------------------------
class LanguageDecoder(Transformer):
    """GPT-2 or Llama, by config alone. It takes embeddings, not ids: an image has no ids."""
    def __init__(self, cfg):
        super().__init__(cfg.text, causal=True)
        C, self.learned = cfg.text.n_embd, cfg.text.position == 'learned'
        self.embedding = nn.Embedding(cfg.vocab_size, C)
        self.norm_in = nn.LayerNorm(C, elementwise_affine=False) if cfg.input_norm else nn.Identity()
        self.position = nn.Parameter(torch.zeros(cfg.block_size, C)) if self.learned else None
        # RoPE: at each position an angle for each pair of channels, some turn fast: (2,block_size,D/2)
        place, pair = (torch.arange(n, device='cpu') for n in (cfg.block_size, C // cfg.text.n_head // 2))
        angle = torch.outer(place.float(), cfg.text.rope_base ** (-pair / len(pair)))
        self.register_buffer('rope', None if self.learned else torch.stack([angle.cos(), angle.sin()]), False)
    head = lambda self, h: F.linear(h, self.embedding.weight)    # (...,C) -> logits (...,V): tied

    def forward(self, x, positions, mask=None, cache=None):
        """x (B,S,C), positions (S,) or (B,S) -> hidden states (B,S,C), ready for the head."""
        if self.learned: return self.run(x + F.embedding(positions, self.position), cache, mask=mask)
        return self.run(x, cache, mask=mask, rope=self.rope[:, positions].unsqueeze(-3))      # (2,..,1,S,D/2)
# 6. The whole model -----------------------------------------------------------------------------------------
class MinimalVLM(nn.Module):
    """Eye, projection and mouth: forward() to train, stream() and generate() to talk, score() to choose."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.vision = VisionEncoder(cfg) if cfg.encoder == 'vit' else ResNetEncoder(cfg)
        self.projection = MultimodalProjection(cfg, self.vision.width)
        self.decoder = LanguageDecoder(cfg)
        self.init_weights()

    def init_weights(self):
        """As GPT-2: std 0.02, less for what writes to the residual stream; convolutions keep PyTorch's."""
        for name, p in self.named_parameters():      # beside inputs of std 1, positions of 0.02 would drown
            std = 0.5 if name == 'decoder.position' and self.cfg.input_norm else 0.02
            if name.endswith(('attn.out.weight', 'mlp.down.weight')):
                std /= math.sqrt(2 * len(self.get_submodule(name.split('.blocks')[0]).blocks))
            if p.dim() == 2: nn.init.normal_(p, std=std)
            elif name.endswith('bias'): nn.init.zeros_(p)
        for m in self.modules():     # queries begin as keys: a token looks at what is like it (2305.09828)
            if isinstance(m, Attention) and m.n_head == m.n_kv_head:
                nn.init.normal_(m.k.weight, std=0.7 / math.sqrt(m.k.in_features))
                m.q.weight.data.copy_(m.k.weight)

    @classmethod
    def from_pretrained(cls, names, cfg=None):
        """A model with public weights, whole, or of encoder and decoder beside a random projection. names: of
        PUBLIC, files or folders, with commas; cfg: if not as published. Positions fit by interpolation."""
        names = names.split(',')
        cfg = cfg or VLMConfig(**ChainMap(*(PUBLIC.get(name, ('', NANOVLM))[1] for name in names)))
        state = {k: x for name in names for k, x in read_public(fetch(name)).items()}
        p, whole = state.get('vision.position'), any(name.startswith('projection') for name in state)
        with explained(f'{" and ".join(names)} do not fit'):
            if p is not None and (side := math.isqrt(len(p))) != cfg.grid:        # a class token is first
                cells = F.interpolate(p[-side ** 2:].T.reshape(1, -1, side, side), cfg.grid, mode='bicubic')
                state['vision.position'] = torch.cat([p[:-side ** 2], cells.flatten(2)[0].T])
            with torch.device('meta' if whole else 'cpu'): model = cls(cfg)  # no memory for what is replaced
            rest = {} if whole else {f'projection.{k}': x for k, x in model.projection.state_dict().items()}
            model.load_state_dict(rest | state, assign=True)
        return model.eval()

    def see(self, images):
        """images (B,3,H,W) or (3,H,W), bytes or normalised floats -> visual tokens (B,N,C); None: (1,0,C)."""
        if images is None: return self.decoder.embedding.weight.new_zeros(1, 0, self.cfg.text.n_embd)
        images, c = images if images.dim() == 4 else images[None], self.cfg
        assert images.shape[2:] == (c.image_size,) * 2, f"{images.shape}, but image_size={c.image_size}"
        if images.dtype == torch.uint8: images = TF.normalize(images / 255, c.image_mean, c.image_std)
        return self.decoder.norm_in(self.projection(self.vision(images.to(next(self.parameters()).dtype))))
    prompts = staticmethod(lambda ids: ids if isinstance(ids, list) else [*torch.atleast_2d(ids)])
    read = lambda self, ids: self.decoder.norm_in(self.decoder.embedding(ids))     # (...,T) -> (...,T,C)

    def hidden(self, visual, input_ids, start=None, cache=None):
        """States (B,T+1,C) of the last visual token (0 without) and of texts (B,T), behind visual (B,N,C) or
        (1,N,C): row t is what predicts token t. start (B,T) or (B,1): the column where a token's own text
        begins; it sees the image and its own text. cache: (buffer, known tokens in it, visual among them)."""
        x = torch.cat([visual.expand(len(input_ids), -1, -1), self.read(input_ids)], dim=1)
        (_, known, N), longest, mask = cache or (None, 0, visual.size(1)), self.cfg.block_size, None
        keys = torch.arange(known + x.size(1), device=x.device)          # columns, those in the cache, too
        positions, queries = keys[known:], keys[known:, None]            # of the new ones
        if len(keys) > longest: raise UserError(f'{len(keys)} tokens, more than block_size={longest}')
        if start is not None:            # padding, too, sees itself: softmax of nothing is nan
            begin = F.pad(start := start.expand(input_ids.shape), (visual.size(1), 0))[:, :, None]   # (B,T,1)
            mask = (keys <= queries) & ((keys < N) | (keys >= N + begin)) | (keys == queries)        # (B,T,S)
            mask, positions = mask[:, None], (positions - begin[..., 0]).clamp(min=0)
        h = F.pad(self.decoder(x, positions, mask, cache and cache[:2]), (0, 0, 1, 0))[:, visual.size(1):]
        if start is None or not N: return h
        # a text's first token is predicted by the image, wherever it stands; also that of an empty prompt
        predicted = max(0, known - N) + torch.arange(h.size(1), device=x.device)     # columns, by h's rows
        first = predicted == torch.cat([start, start[:, -1:]], dim=1)
        return torch.where(first[:, :, None], h[:, :1], h)

    def forward(self, images, input_ids, targets=None, start=None, return_logits=True, contrastive=0.0):
        """images: see see(); input_ids (B,T) or (T,); targets: the same ids, unshifted, or -100 for no loss;
        start: see hidden(). -> logits (B,T,V) or None, row t predicts token t+1; loss, nats a scored token,
        or None without targets. contrastive: the weight in it of SigLIP's loss, nats an image."""
        ids, visual, loss = torch.atleast_2d(input_ids), self.see(images), None
        h = self.hidden(visual, ids, start)
        if targets is not None:
            scored = (targets := targets.view_as(ids)) != -100
            if images is None: scored &= torch.arange(ids.size(1)).to(ids) != (0 if start is None else start)
            # the one shift: h's row t predicts token t; rows in 256s: a CPU keeps a kernel for each shape
            states = h[:, :-1][scored]               # few of all, and the head is wide
            logits = self.decoder.head(F.pad(states, (0, 0, 0, -len(states) % 256)))[:len(states)].float()
            loss = F.cross_entropy(logits, targets[scored])
            if contrastive:      # SigLIP, scale and bias fixed: which text, read alone, is of which image?
                words = self.hidden(self.see(None), ids, start)[:, 1:] * scored[..., None]         # (B,T,C)
                cosine = F.normalize(visual.mean(1), dim=-1) @ F.normalize(words.sum(1), dim=-1).T     # (B,B)
                siglip = F.binary_cross_entropy_with_logits(10 * cosine - 5, torch.eye(len(ids)).to(cosine))
                loss = loss + contrastive * siglip * len(ids)
        return (self.decoder.head(h[:, 1:]) if return_logits else None), loss

    @torch.no_grad()
    def stream(self, images, prompt_ids, max_new_tokens=50, temperature=1.0, top_p=1.0, top_k=0, stop=-1,
               use_cache=True, num_samples=1):
        """Yields the next token of each row, (B * num_samples, 1), as soon as it is known. images: see see();
        prompt_ids (B,T), (T,), or a list of B prompts (T_i,). A row that met the id stop repeats it until all
        have. use_cache=False computes all again at each token: slow, and the same."""
        with contextlib.ExitStack() as afterwards:
            for m in self.modules(): afterwards.callback(setattr, m, 'training', m.training)
            self.eval()
            # 1. the image, then the prompts, the shorter ones padded on their left
            ids = nn.utils.rnn.pad_sequence(prompts := self.prompts(prompt_ids), True, padding_side='left')
            visual, (B, T), longest = self.see(images), ids.shape, self.cfg.block_size
            N, shortest, attn = visual.size(1), min(map(len, prompts)), self.decoder.blocks[0].attn
            if not 0 < N + shortest <= N + T < longest:
                raise UserError(f'image {N} + prompt {T} tokens: at least 1, < block_size={longest}')
            start = ids.new_tensor([[T - len(prompt)] for prompt in prompts]) if shortest < T else None
            end = min(N + T + max_new_tokens, longest)       # keys and values of all layers, allocated once:
            size = self.cfg.text.n_layer, 2, B, attn.n_kv_head, end, attn.head_dim
            kv, visual = visual.new_zeros(size) if use_cache else None, visual.expand(B, -1, -1)
            # 2. read them, remember keys and values, and share these among the samples
            h = self.hidden(visual, ids, start, (kv, 0, N) if use_cache else None)
            share = lambda x, dim=0: x if x is None else x.repeat_interleave(num_samples, dim)
            visual, ids, start, h, kv = share(visual), share(ids), share(start), share(h), share(kv, 2)
            # 3. say a token, read it, and again
            head, done = self.decoder.head, torch.zeros(len(h), 1, dtype=torch.bool, device=h.device)
            for S in range(N + T, end):
                token = sample_top_p(head(h[:, -1]), top_p, temperature, top_k).masked_fill(done, stop)
                done |= token == stop
                yield token
                if S + 1 == end or done.all(): break
                ids, visual = (token, visual[:, :0]) if use_cache else (torch.cat([ids, token], 1), visual)
                h = self.hidden(visual, ids, start, (kv, S, N) if use_cache else None)

    def generate(self, images, prompt_ids, max_new_tokens=50, *, stop=-1, num_samples=1, **options):
        """stream(), collected: (B * num_samples, T+new) ids; for a list of prompts a list of (T_i+new_i,), in
        which each row ends with its own stop id and equals what its prompt gives alone."""
        prompts = [ids for ids in self.prompts(prompt_ids) for _ in range(num_samples)]
        steps = self.stream(images, prompt_ids, max_new_tokens, stop=stop, num_samples=num_samples, **options)
        new = torch.cat([prompts[0].new_empty(len(prompts), 0), *steps], dim=1)
        rows = [torch.cat(pair) for pair in zip(prompts, new)]
        return torch.stack(rows) if not isinstance(prompt_ids, list) else [
            row[:len(row) - max(0, int((n == stop).sum()) - 1)] for row, n in zip(rows, new)]

    @torch.no_grad()
    def score(self, image, prompt_ids, choices):
        """Log-probability (n,) of n answers, ids (T_i,), after an image and prompt (T,); wants eval mode."""
        ids = nn.utils.rnn.pad_sequence([torch.cat([prompt_ids, ids]) for ids in choices], batch_first=True)
        targets = nn.utils.rnn.pad_sequence(choices, batch_first=True, padding_value=-100)             # (n,T)
        logits = self.decoder.head(self.hidden(self.see(image), ids)[:, len(prompt_ids):-1])
        return -F.cross_entropy(logits.float().transpose(1, 2), targets, reduction='none').sum(1)
# 7. Sampling ------------------------------------------------------------------------------------------------
def sample_top_p(logits, p=0.9, temperature=1.0, top_k=0):
    """Draws from the smallest set of tokens whose probability reaches p, the one that crosses p included
    (1904.09751), after temperature, 0 = greedy, and top_k, 0 = all. logits (B,V), (V,) -> ids (B,1), (1,)."""
    if temperature < 0 or top_k < 0 or not 0 < p <= 1:
        raise UserError(f'temperature={temperature} and top_k={top_k} must be >= 0, top_p={p} > 0 and <= 1')
    if temperature == 0: return logits.argmax(dim=-1, keepdim=True)
    logits, order = logits.float().topk(min(top_k or logits.size(-1), logits.size(-1)))     # likeliest first
    probs = ((logits - logits[..., :1]) / temperature).softmax(dim=-1)
    probs = probs.masked_fill((probs.cumsum(dim=-1) - probs >= p) & (p < 1), 0.0)    # those before reach p
    return order.gather(-1, torch.multinomial(probs, 1))
# 8. Weights: public ones, and checkpoints -------------------------------------------------------------------
NAMES = (    # ours (-: unused), and what they replace of ViT, ResNet, SigLIP, GPT-2, Llama, nanoVLM, in order
    (r'-\g<0>', r'^(text_model|logit|heads|fc|(vision.*)?head.(?!w)).*|.*(_freq|\.attn\.(masked_)?bias)'),
    ('vision.', r'^vision_(model|encoder)\.|^(?=class_|conv|bn1|layer\d|encoder\.|embeddings|post_)'),
    ('decoder.', r'^(transformer|model|decoder)\.|^(?=wte|wpe|h\.|ln_f|lm_head)'), ('projection.', r'^MP\.'),
    ('blocks.', r'(encoder\.)?\b(layers|h)\.(encoder_layer_)?'), ('attn', 'self_(attn|attention)'),
    ('stem', r'conv_proj|(embeddings\.)?patch_embedding(\.conv)?(?=\.(weight|bias))'),
    ('position', r'(\w+\.)?pos(ition)?_embedding(\.weight)?$|wpe\.weight'), ('norm1', 'input_layernorm'),
    ('norm2', r'post_att\w+norm'), (r'norm\2', '(ln_?|layer_norm)([12])'), ('mlp.up', r'mlp\.(0|fc1|c_fc)'),
    ('norm', r'(encoder\.)?\bln\b|ln_f|post_layernorm|layer_norm\b'), ('attn.out', r'attn\.(out|o|c)_proj'),
    ('embedding', r'embed_tokens|wte|token_embedding|\b(lm_)?head'), ('mlp.down', r'mlp\.(3|fc2|c_proj)'),
    ('qkv.', r'in_proj_|c_attn\.'), (r'.\1', r'\.(qkv|q|k|v|gate|up|down)_proj'))

def fetch(name, file='model.safetensors'):
    """The path of a published file; name: the file, its folder, or one of PUBLIC, whose files are downloaded
    once, to PyTorch's cache. What came half is refused when it is read: delete it, and it comes anew."""
    if os.path.exists(name) or name not in PUBLIC: return f'{name}/{file}' if os.path.isdir(name) else name
    url = f'https://huggingface.co/{PUBLIC[name][0]}/resolve/main/{file}'
    if not PUBLIC[name][0]: url = torchvision.models.get_model_weights(name).DEFAULT.url
    path = os.path.join(torch.hub.get_dir(), 'vlm', name, os.path.basename(url))
    with explained(f'{url} did not come: try again, put it at {path}, or give a path in place of {name}'):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not os.path.exists(path): torch.hub.download_url_to_file(url, path)
    return path

def read_safetensors(path):
    """Yields (name, tensor), memory-mapped: read when used. A file is the length of a header in 8 bytes, the
    header, JSON with dtype, shape and data_offsets of each name, and the data."""
    with open(path, 'rb') as f: data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)  # writes stay in RAM
    dt = defaultdict(lambda: torch.int8, F32=torch.float, F16=torch.half, BF16=torch.bfloat16, I64=torch.long)
    start = 8 + int.from_bytes(data[:8], 'little')
    for name, entry in json.loads(data[8:start]).items():
        if name == '__metadata__': continue
        dtype, n, (first, end) = dt[entry['dtype']], math.prod(entry['shape']), entry['data_offsets']
        if not 0 <= first <= end <= len(data) - start or end - first != n * dtype.itemsize:
            raise ValueError(f'{name} cannot be {entry} in a file of {len(data)} bytes')
        yield name, torch.frombuffer(data, dtype=dtype, offset=start + first, count=n).view(entry['shape'])

def read_public(path):
    """{our name: fp32 tensor} of a file of public weights, transposed, split and joined."""
    safe, out = path.endswith('.safetensors'), {}
    with explained(f'{path}: no public weights that can be read. Names are {", ".join(PUBLIC)}'):
        for was, x in read_safetensors(path) if safe else torch.load(path, 'cpu', weights_only=True).items():
            name, x = was, x.T.contiguous() if re.search(r'\bc_.*weight', was) else x            # GPT-2's
            for ours, theirs in NAMES: name = re.sub(theirs, ours, name)
            for part, y in zip('qkv', x.chunk(3)) if 'qkv' in name else [('', x)]:
                key, y = name.replace('qkv', part), y.float() if y.is_floating_point() else y
                if y is not out.setdefault(key, y) and not y.equal(out[key]): raise ValueError(f'two {was}')
    return {name: x.squeeze(0) if 'position' in name else x for name, x in out.items() if name[0] != '-'}

def save_checkpoint(path, model, tokenizer, **more):
    """Writes all to one file or leaves the old one: the new is written beside it, then takes its place."""
    more.update(model=model.state_dict(), config=asdict(model.cfg), tokenizer=tokenizer.state)
    with explained(f'could not write {path}; what was there before is untouched', OSError, RuntimeError):
        with open(f'{path}.part', 'wb') as f:
            torch.save(more, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f'{path}.part', path)

def load_checkpoint(path, device='cpu'):
    """-> model, checkpoint: a dictionary, its 'tokenizer' ready to use. Runs no code in the file."""
    if os.path.isdir(path) or path in PUBLIC:                # of public weights and their tokenizer
        model = MinimalVLM.from_pretrained(path).to(device)
        return model, {'tokenizer': Tokenizer.make(path if os.path.isdir(path) else model.cfg.tokenizer)}
    if not os.path.isfile(path): raise UserError(f'no {path}: `python train.py` makes out/ckpt.pt')
    with explained(f'{path} is damaged, or no checkpoint of this version of vlm.py'):
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        cfg = checkpoint.pop('config')
        model = MinimalVLM(VLMConfig(**cfg | {k: TransformerConfig(**cfg[k]) for k in ('vision', 'text')}))
        model.load_state_dict(checkpoint.pop('model'))
        checkpoint['tokenizer'] = Tokenizer(**checkpoint['tokenizer'])
    return model.to(device).eval(), checkpoint
# 9. Text and pixels -----------------------------------------------------------------------------------------
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"  # as SmolLM2
WORDS = PIECES.replace(r'|\p{N}|', r'| ?\p{N}+|').replace(r'|\s+(?=\p{N})', '')       # as GPT-2
END = '<|endoftext|>'
Image.MAX_IMAGE_PIXELS = 40_000_000      # Pillow refuses twice as many: a small file can claim to be huge
pictures_of = lambda names: [n for n in names if n.lower().endswith(tuple(Image.registered_extensions()))]

class Tokenizer:
    """Text <-> ids: a tiktoken Encoding whose state fits into a checkpoint.
    ranks {token as latin-1: id} in merging order, special {text: id}, pieces: how text is split."""
    def __init__(self, name, ranks, special, pieces=PIECES):
        self.state = dict(name=name, ranks=ranks, special=special, pieces=pieces)
        ranks = {token.encode('latin-1'): i for token, i in ranks.items()}
        encoding = tiktoken.Encoding(name, pat_str=pieces, mergeable_ranks=ranks, special_tokens=special)
        self.bytes, self.encode = dict(zip(ranks.values(), ranks)), encoding.encode_ordinary    # text -> ids
        self.name, self.n_vocab, self.eos = name, encoding.n_vocab, special[END]
    decode = lambda self, ids: ''.join(self.stream(ids))

    def stream(self, ids):
        """Text as ids come in. Special ids are silent; a character in several tokens waits for its last."""
        utf8 = codecs.getincrementaldecoder('utf-8')(errors='replace')
        for i in ids: yield utf8.decode(self.bytes.get(int(i), b''))
        yield utf8.decode(b'', final=True)

    @classmethod
    def make(cls, name, texts=(), vocab_size=0):
        """'bytes', 'bpe' (learned from texts), or a Hugging Face tokenizer.json, by its path, its folder's or
        a name in PUBLIC, as 'gpt2': of a byte-level BPE whose ids follow its merges."""
        if name in ('bytes', 'bpe'):
            ranks = learn_bpe(map(str.strip, texts if name == 'bpe' else ()), vocab_size - 1)
            return cls(name, ranks, {END: len(ranks)})
        with explained(f'tokenizer={name} is not to be had here; from nothing, --tokenizer=bpe will do'):
            with open(fetch(name, 'tokenizer.json'), encoding='utf-8') as f: data = json.load(f)
            vocab, special = data['model']['vocab'], {t['content']: t['id'] for t in data['added_tokens']}
            merges = [vocab[''.join(m).replace(' ', '')] for m in data['model']['merges']]   # pairs or "a b"
            if merges != sorted(merges): raise ValueError('its ids do not follow its merges')
            clear = {*range(33, 127), *range(161, 173), *range(174, 256)}        # bytes written as themselves
            others = {256 + n: b for n, b in enumerate(sorted({*range(256)} - clear))}
            ranks = {token.translate(others): i for token, i in vocab.items() if token not in special}
            return cls(name, ranks, special, PIECES if '"Digits"' in json.dumps(data) else WORDS)

def learn_bpe(texts, size):
    """Byte-pair encoding (1508.07909): the most frequent pair becomes a token -> {token as latin-1: rank}."""
    words = Counter(w for t in texts for w in re.findall(r' ?[^\W\d_]+|\d| ?(?:[^\w\s]|_)+|\s+', ' ' + t))
    parts = [''.join(map('‹{:c}›'.format, w.encode('utf8', 'replace'))) for w in words]
    counts, ranks = [*words.values()], {chr(b): b for b in range(256)}
    pairs, where = Counter(), defaultdict(set)           # how often a pair occurs, and in which words
    def tally(i, sign):
        for pair in itertools.pairwise(parts[i][1:-1].split('›‹')):
            pairs[pair] += sign * counts[i]
            where[pair].add(i)
    for i in range(len(words)): tally(i, 1)
    while len(ranks) < size and pairs and pairs[best := max(pairs, key=pairs.get)] > 1:
        ranks.setdefault(''.join(best), len(ranks))      # two pairs may spell the same token
        for i in where.pop(best):
            tally(i, -1)
            parts[i] = parts[i].replace('‹{}›‹{}›'.format(*best), f"‹{''.join(best)}›")
            tally(i, 1)
    return ranks

def open_image(path, size=0):
    """A picture file, upright and RGB, or a UserError. size: enough pixels a side, for JPEGs to shrink."""
    with explained(f'{path}: not a picture that can be read'), Image.open(path) as image:
        image.draft('RGB', (size, size) if size else image.size)
        return to_rgb(image)

def to_rgb(image):
    """Any Pillow image as upright 8-bit RGB: EXIF rotation, deep grey scaled, alpha over white, frame 1."""
    image.load()
    with contextlib.suppress(Exception): image = ImageOps.exif_transpose(image)  # broken EXIF spoils nothing
    if image.mode[0] in 'IF':                # 16 or 32 bits a pixel
        high, whites = image.getextrema()[1], (1, 255) if image.mode == 'F' else (255, 65535)
        white = next((white for white in whites if high <= white), high)
        image = image.convert('F').point(lambda v: v * (255 / white) + 0).convert('L')
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
    return image.convert('RGB')

def image_transform(cfg, augment=False):
    """A function from Pillow images to bytes (3,H,W). augment: mirrors, crops and colours at random."""
    size, bilinear = (cfg.image_size, cfg.image_size), Image.Resampling.BILINEAR
    vary = nn.Sequential(RandomHorizontalFlip(), RandomResizedCrop(size, (0.7, 1.0)), ColorJitter(.2, .2, .2))
    crop, squash = lambda x: ImageOps.fit(x, size, bilinear), lambda x: x.resize(size, bilinear, None, 1.0)
    fit = vary if augment else crop if cfg.image_resize == 'crop' else squash
    return lambda image: TF.pil_to_tensor(fit(to_rgb(image)))

def encode_prompt(tokenizer, cfg, prompt):
    """A prompt, put as the model wants it, as ids; an empty one asks for a caption."""
    prompt = prompt.strip() or cfg.caption_prompt
    return tokenizer.encode(cfg.prompt_template.replace('{}', prompt)) if prompt else []

def collate(items, cfg, tokenizer, transform):
    """Items (image, prompt, answer) -> images (B,3,H,W), input_ids and targets (B,T), -100 where unscored.
    Neighbours of one image share a row, cut where the block ends; start (B,T) is then fourth: see hidden."""
    room, rows = cfg.block_size - cfg.n_visual, []
    for _, texts in itertools.groupby(items, lambda item: id(item[0])):
        ids, targets, start = [], [], []
        for image, prompt, answer in texts:
            prompt = encode_prompt(tokenizer, cfg, prompt)[:cfg.longest_prompt]
            answer = (tokenizer.encode(' ' + answer.strip()) + [tokenizer.eos])[:room - len(prompt)]
            start += [len(ids)] * len(prompt + answer)
            ids, targets = ids + prompt + answer, targets + [-100] * len(prompt) + answer
        rows.append((ids, targets, start, transform(image)))
    longest = min(room, -(-max(len(row[0]) for row in rows) // 16) * 16)     # a CPU keeps a kernel for each
    pad = lambda i, value: torch.tensor([(row[i] + [value] * longest)[:longest] for row in rows])
    batch = torch.stack([row[3] for row in rows]), pad(0, 0), pad(1, -100)
    return (*batch, pad(2, 0)) if len(rows) < len(items) else batch
# 10. Data ---------------------------------------------------------------------------------------------------
COLORS = {'red': (225, 40, 40), 'green': (40, 170, 70), 'blue': (40, 80, 225), 'yellow': (240, 215, 40),
          'orange': (245, 135, 25), 'purple': (145, 55, 190), 'cyan': (60, 205, 225), 'black': (35, 35, 35)}
# corners: angles clockwise from the top (turn in degrees) and distances from the centre in radii, in rotation
ring = lambda n, turn, *radii: [(math.radians(turn + 360 * i / n), radii[i % len(radii)]) for i in range(n)]
SHAPES = {'circle': ring(36, 0, 1), 'square': ring(4, 45, 1.25), 'triangle': ring(3, 0, 1),
          'diamond': ring(4, 0, 1.1, 0.7), 'star': ring(10, 0, 1.05, 0.42),
          'cross': [c for arm in zip(ring(4, -17, 1.05), ring(4, 17, 1.05), ring(4, 45, 0.42)) for c in arm]}
SIZES = {'small': (0.105, 0.12), 'large': (0.16, 0.18)}          # radii, in picture widths
Thing = namedtuple('Thing', 'pair color shape size place x y r')    # x, y and r (radius) in picture widths
PLACES = ('at the top left, at the top, at the top right, on the left, in the center, on the right, '
          'at the bottom left, at the bottom, at the bottom right').split(', ')
UNSEEN = {*map(' '.join, zip(COLORS, SHAPES))}                   # pairs kept from training
QUESTIONS = 'count side exists shape color side exists choice shape color side'.split()   # asked of a scene

class Shapes(torch.utils.data.Dataset):
    """Scenes drawn from (seed, split, index) alone, with captions and questions. 'train' and 'val' have no
    UNSEEN pair in picture or words, 'novel' only such. kind: 'mixed', 'caption' or 'question'."""
    def __init__(self, split, seed=0, kind='mixed', pixels=128):
        self.split, self.seed, self.pixels, novel = split, seed, pixels, split == 'novel'
        self.part = dict(mixed=slice(None), caption=slice(1), question=slice(1, None))[kind]
        self.pairs = [p for p in map(' '.join, itertools.product(COLORS, SHAPES)) if (p in UNSEEN) == novel]
    n_images, __len__ = 1_000_000, lambda self: self.n_images
    texts = property(lambda self: (' '.join(item[1:]) for i in range(400) for item in self.about(i)))
    __getitem__ = lambda self, index: (items := self.about(index))[index % len(items)]

    def about(self, index):
        """All items about scene number index, in random order: a caption and the questions that suit it."""
        scene = self.scene(rng := random.Random(f'{self.seed} {self.split} {index}'))
        texts = [*filter(None, (self.ask(kind, scene, rng) for kind in ('caption', *QUESTIONS)))][self.part]
        image = Image.new('RGB', (self.pixels, self.pixels), tuple(rng.randint(225, 255) for _ in range(3)))
        for t in scene:
            shade = tuple(min(255, max(0, v + rng.randint(-30, 30))) for v in COLORS[t.color])
            corners = [(t.x + t.r * d * math.sin(a), t.y - t.r * d * math.cos(a)) for a, d in SHAPES[t.shape]]
            ImageDraw.Draw(image).polygon([(x * self.pixels, y * self.pixels) for x, y in corners], shade)
        return [(image, *text) for text in rng.sample(texts, len(texts))]

    def scene(self, rng):
        """1 to 3 things, half the time 3, that do not touch, in reading order."""
        while True:
            made = []
            for place in sorted(rng.sample(range(9), rng.choice((1, 2, 2, 3, 3, 3)))):
                x, y = (0.21 + 0.29 * cell + rng.uniform(-0.04, 0.04) for cell in (place % 3, place // 3))
                last = {*made[-1].pair.split()} if made and rng.random() < 0.3 else ()   # be like the last
                pair = rng.choice([p for p in self.pairs if last & {*p.split()}] if last else self.pairs)
                (color, shape), size = pair.split(), rng.choice([*SIZES])
                made.append(Thing(pair, color, shape, size, place, x, y, rng.uniform(*SIZES[size])))
            if all(t is u or math.hypot(t.x - u.x, t.y - u.y) > t.r + u.r + 0.01 for t in made for u in made):
                return made

    def ask(self, kind, scene, rng):
        """(prompt, answer) of that kind, or None if the scene does not suit; choices: its colors first."""
        t, pairs, traits = rng.choice(scene), [t.pair for t in scene], ' '.join(t.pair for t in scene).split()
        colors, shapes = traits[::2], traits[1::2]
        if kind == 'caption':    # the place first: who knows where to look also finds pairs never seen before
            *most, last = [f'{PLACES[t.place]} a {t.size} {t.pair}' for t in scene]
            return '', f'{", ".join(most)} and {last}' if most else last
        if kind == 'count':
            twice = [trait for trait in traits if traits.count(trait) > 1] if rng.random() < 0.4 else []
            word = rng.choice(twice or ['', t.color, t.shape, rng.choice([*COLORS]), rng.choice([*SHAPES])])
            which = f'have the {"color" if word in COLORS else "shape"} {word}' if word else 'are there'
            n = traits.count(word) if word else len(scene)
            return f'how many objects {which}?', ('zero', 'one', 'two', 'three')[n]
        if kind in ('color', 'choice') and shapes.count(t.shape) == 1:
            wrong = sorted([c for c in COLORS if c != t.color], key=lambda c: (c not in colors, rng.random()))
            choice = ': {}, {} or {}'.format(*rng.sample([t.color, *wrong[:2]], 3))
            return f'what color is the {t.shape}{choice if kind == "choice" else ""}?', t.color
        if kind == 'shape': return f'what shape is {PLACES[t.place]}?', t.shape
        near = [p for p in self.pairs if p not in pairs and (t.color in p or t.shape in p)]
        if kind == 'exists' and near:    # what is absent is near to what is there
            pair, truth = rng.choice([(t.pair, 'yes'), (rng.choice(near), 'no')])
            return f'is there {"an" if pair[0] == "o" else "a"} {pair}?', truth
        apart = [(t, u) for t in scene for u in scene if t.place % 3 != u.place % 3]
        if kind == 'side' and apart and len({*shapes}) == len(scene):
            t, u = rng.choice(apart)
            return f'is the {t.shape} left or right of the {u.shape}?', ('right', 'left')[t.x < u.x]

def read_captions(path):
    """Yields (image name, prompt, answer) of a caption file, .csv, .txt, .jsonl, COCO's or LLaVA's .json,
    or of a folder of folders named after what is on their images."""
    if os.path.isdir(path): rows = [
        dict(image=f'{at}/{name}', prompt='what is this?', answer=os.path.basename(at).replace('_', ' '))
        for at, _, names in os.walk(os.path.abspath(path), followlinks=True) for name in pictures_of(names)]
    else:
        with open(path, encoding='utf-8-sig', newline='') as f: lines = [*f]
        if path.endswith('.jsonl'): rows = [json.loads(line) for line in lines if line.strip()]
        elif not path.endswith('.json'): rows = csv.DictReader(lines)
        elif isinstance(data := json.loads(''.join(lines)), dict):
            files = {image['id']: image['file_name'] for image in data['images']}
            rows = [{'image': files.get(a['image_id'], a['image_id']), **a} for a in data['annotations']]
        else:                            # LLaVA: each answer with the turn before it is an item
            rows = [dict(image=t.get('image', 'no image'), prompt=q['value'], answer=a['value']) for t in data
                    for q, a in itertools.pairwise(t['conversations']) if a['from'] == 'gpt']
    for n, row in enumerate(rows, 1):
        image, prompt, text = row.get('image'), row.get('prompt') or '', row.get('caption', row.get('answer'))
        if not image or text in (None, '') or None in row or not prompt and 'caption' not in row:
            raise ValueError(f'row {n}: wanted image and caption, or image, prompt and answer, not {[*row]}')
        yield str(image), str(prompt).replace('<image>', '').strip(), str(text).strip()

class CaptionedImages(torch.utils.data.Dataset):
    """Items (PIL image, prompt, answer) from {image name: [[prompt, answer], ...]}, kept as a block of bytes
    that forked workers share. An unreadable image is named once, marked bad, and the next one stands in."""
    def __init__(self, texts, folder, source, size=0):
        self.folder, self.source, self.size, self.n_images = folder, source, size, len(texts)
        entries = [json.dumps(entry).encode() for entry in texts.items()]    # [name, [[prompt, answer], ...]]
        self.ends, self.block = torch.tensor([0, *map(len, entries)]).cumsum(0), b''.join(entries)
        self.owner = torch.repeat_interleave(torch.tensor([*map(len, texts.values())]))     # image of an item
        self.bad = torch.zeros(self.n_images, dtype=torch.uint8).share_memory_()
    __len__ = lambda self: len(self.owner)
    entry = lambda self, i: json.loads(self.block[self.ends[i]:self.ends[i + 1]])
    texts = property(lambda self: (' '.join(t) for i in range(self.n_images) for t in self.entry(i)[1]))
    __getitem__ = lambda self, i: (ts := sorted(self.about(self.owner[i]), key=lambda t: t[1:]))[i % len(ts)]

    def about(self, index):
        """All items about image number index, in random order."""
        for i in (i for i in itertools.chain(range(index, self.n_images), range(index)) if not self.bad[i]):
            try:
                name, texts = self.entry(i)
                image = open_image(os.path.join(self.folder, name), self.size)
                return [(image, *texts[j]) for j in torch.randperm(len(texts))]
            except UserError as e:
                self.bad[i] = 1
                loud = 'WARNING, over 1 % are bad: ' if self.bad.sum() > self.n_images / 100 else ''
                print(f'{loud}skipped: {e}', file=sys.stderr)
        raise UserError(f'{self.source}: not one of its {self.n_images} images can be read')

def make_dataset(spec, split='train', image_dir='', val_spec='', size=0, seed=0):
    """Items (PIL image, prompt, answer) of 'shapes', a caption file or a folder. split: 'train', 'val', or of
    shapes 'novel'. Without val_spec 5 % of the images are held out. image_dir: see the README."""
    if spec == 'shapes': return Shapes(split, seed)
    path, texts = val_spec if split == 'val' and val_spec else spec, defaultdict(list)
    with explained(f'dataset={path} is neither shapes nor a folder, and not a caption file as in the README'):
        for name, *text in sorted(read_captions(path)): texts[name].append(text)
    beside = path if os.path.isdir(path) else os.path.dirname(path) or '.'
    folders = [image_dir] if image_dir else [beside, f'{beside}/images', f'{beside}/Images']
    found = [[name for name in texts if os.path.isfile(os.path.join(folder, name))] for folder in folders]
    there, folder = max(zip(found, folders), key=lambda pair: len(pair[0]))
    if not there: raise UserError(f'{path} names {len(texts)} images, none is in {folder}: see --image_dir')
    if (missing := sorted(texts.keys() - there)) and (split == 'train' or val_spec):     # one file: tell once
        print(f'{"WARNING: " if len(missing) > len(texts) / 100 else ""}{path}: {len(missing)} of '
              f'{len(texts)} images are missing and skipped: {", ".join(missing[:3])} ...', file=sys.stderr)
    held_out = set(random.Random(1337).sample([*texts], max(1, len(texts) // 20)))
    own = {name: texts[name] for name in there if val_spec or (name in held_out) == (split == 'val')}
    if not own: raise UserError(f'{path} has too few images to hold one out: see --val_dataset')
    return CaptionedImages(own, folder, path, size)
# 11. Command line -------------------------------------------------------------------------------------------
def override(settings, argv=None):
    """Lets `--name=value`, `--name value` and a bare `--flag` change the globals above its call: as nanoGPT,
    but checked by their comments: words in quotes (others too, if it ends in ...) or "> 0 and <= 1;"."""
    with open(settings['__file__'], encoding='utf-8') as f:
        comments = dict(re.findall(r'^(\w+) = .*?  +# (.*)$', f.read().split('override(')[0], re.M))
    wanted = {int: 'a whole number', float: 'a number', bool: 'true or false', str: 'a word'}
    def read(name, text):
        kind, comment = type(settings[name]), comments[name]
        checks = comment.split(';')[0].split(' and ') if comment[0] in '<>' else []
        words = re.findall("'(.*?)'", comment) if comment[0] == "'" and not comment.endswith('...') else None
        with contextlib.suppress(KeyError, ValueError):
            value = {'true': True, 'false': False}[text.lower()] if kind is bool else kind(text)
            if all(eval(f'x {c}', {'x': value}) for c in checks) and value in (words or [value]): return value
        raise argparse.ArgumentTypeError(f'{text!r} is not {wanted[kind]} as asked for: {comment}')
    parser = argparse.ArgumentParser(description=settings['__doc__'], allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f'{parser.prog}: {message}\n')
    for name, comment in comments.items():
        bare = dict(nargs='?', const=True) if isinstance(settings[name], bool) else {}
        parser.add_argument(f'--{name}', type=lambda text, k=name: read(k, text), default=settings[name],
                            metavar=repr(settings[name]), help=comment.replace('%', '%%'), **bare)
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split('=')[0], [f'--{name}' for name in comments], 1)
        parser.error(f'no setting {unknown[0]}; {f"did you mean {near[0]}?" if near else "--help lists all"}')
    settings.update(vars(found))
    warnings.filterwarnings('ignore', module='PIL')      # of odd pictures; what is too odd raises
    with contextlib.suppress(AttributeError): sys.stdout.reconfigure(errors='backslashreplace')  # odd paths
    say = lambda _, e, at: parser.exit(1, f'{parser.prog}: {str(e).split("vlm.UserError: ")[-1].strip()}\n')
    sys.excepthook = lambda kind, *e: (say if issubclass(kind, UserError) else sys.__excepthook__)(kind, *e)
