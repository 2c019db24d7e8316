"""Write tests/data/tokenizer_goldens.json: a corpus, the token ids that llama.cpp gives it, and the part of the vocabularies it takes.

    python make_tokenizer_goldens.py SmolLM2-135M-Instruct.Q4_1.gguf gemma3-270m-q4_k_m.gguf

Needs llama-cpp-python and gguf besides pymistral. The two models give ids for every string; for the other kinds of pre-tokenizer the
first model's vocabulary is written again under that kind's name, and a digest of the ids is kept. The tests need none of this: they build
each tokenizer from the tokens and merges that the corpus can reach, at their original ids.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
from llama_cpp import Llama

from pymistral.loading.pre_tokenizers import KINDS
from pymistral.loading.tokenizer import BYTE_CHARACTERS, Tokenizer
from pymistral.loading.tokenizer_gguf import tokenizer_from_gguf

OUTPUT = Path(__file__).parent.parent / "data" / "tokenizer_goldens.json"

SENTENCES = """
The quick brown fox jumps over the lazy dog.
I'm sure they've said we'll go; it's what you'd expect, isn't it? HE'S, I'LL, THEY'RE
Der schnelle braune Fuchs springt über den faulen Hund – Straße, Größe, Übermut, Äpfel.
Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft
Le cœur a ses raisons que la raison ne connaît point ; où êtes-vous, garçon ? « Voilà ! »
El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia y frío; ¿añoraba a su querido cachorro? ¡Sí!
À noite, vovô Kowalsky vê o ímã cair no pé do pinguim queixoso; não há ninguém.
Quel vituperabile xenofobo zelante assaggia il whisky ed esclama: alleluja! Perché no? È così.
Pchnąć w tę łódź jeża lub ośm skrzyń fig. Zażółć gęślą jaźń.
Příliš žluťoučký kůň úpěl ďábelské ódy.
Árvíztűrő tükörfúrógép, jó foxim és don Quijote húszwattos lámpánál ülve.
Pijamalı hasta yağız şoföre çabucak güvendi. İstanbul'da ığdır IĞDIR iğne.
Съешь же ещё этих мягких французских булок, да выпей чаю. ПРИВЕТ, Мир!
Жебракують філософи при ґанку церкви в Гадячі, ще й шатро їхнє п'яне знаємо.
Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. ΚΑΛΗΜΕΡΑ κόσμε; ἄνθρωπος ᾧ
דג סקרן שט בים מאוכזב ולפתע מצא לו חברה. שָׁלוֹם עֲלֵיכֶם
نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر ومغلف بجلد أزرق. مَرْحَبًا ١٢٣٤٥
اکثر لوگوں کو یہ معلوم نہیں ہے کہ اردو ایک خوبصورت زبان ہے۔
بر خلاف آنچه می‌خواهیم، نیم‌فاصله‌ها مهم‌اند؛ ۱۲۳
ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश करने वाले विष्णुवतार भगवान श्रीराम। १२३
আমার সোনার বাংলা, আমি তোমায় ভালোবাসি। ০১২৩
ਊਠ ਅਤੇ ਘੋੜਾ, ਪੰਜਾਬੀ ਲਿਖਤ।
તમે કેમ છો? ગુજરાતી લખાણ.
யாமறிந்த மொழிகளிலே தமிழ்மொழி போல் இனிதாவது எங்கும் காணோம்.
తెలుగు భాష చాలా అందమైనది. దేశ భాషలందు తెలుగు లెస్స
ಕನ್ನಡ ನುಡಿ, ಚೆಲುವ ಕನ್ನಡ ನಾಡು.
മലയാളം ഒരു ദ്രാവിഡ ഭാഷയാണ്.
සිංහල භාෂාව ශ්‍රී ලංකාවේ ප්‍රධාන භාෂාවයි.
เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน ๑๒๓
ພາສາລາວ ເປັນພາສາທາງການຂອງປະເທດລາວ.
မြန်မာဘာသာစကား ရေးသားခြင်း။
ភាសាខ្មែរ គឺជាភាសាផ្លូវការ។
བོད་སྐད་དང་བོད་ཡིག
ქართული ენა, გამარჯობა მსოფლიო. ᲐᲑᲒ ⴀⴁⴂ
Բարեւ աշխարհ, հայերէն լեզու։
ሰላም ልዑል፤ የአማርኛ ቋንቋ።
我能吞下玻璃而不伤身体。人工智能正在改变世界，你觉得呢？
我能吞下玻璃而不傷身體，繁體中文測試：「引號」、『書名』。
いろはにほへと ちりぬるを。カタカナとｶﾀｶﾅ、漢字とひらがなの混在文章。２０２４年１２月
키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다. 안녕하세요!
Do bạch kim rất quý nên sẽ dùng để lắp vô xương. Tiếng Việt có dấu: ắ ằ ẳ ẵ ặ.
Hingga kini, "Zaman Kuno" masih menjadi misteri bagi banyak orang Indonesia.
Habari ya asubuhi, rafiki yangu; Kiswahili ni lugha nzuri.
Ìwé yìí dára gan-an; ẹ kú àárọ̀, ọmọ Yorùbá.
Flygande bäckasiner söka hwila på mjuka tuvor. Høj bly gom vandt fræk sexquiz på wc. Æ ø å
Törkylempijävongahdus, Albert osti fagotin ja töräytti puhkuvan melodian.
Kæmi ný öxi hér ykist þjófum nú bæði víl og ádrepa. Ð þ
Gheobhaidh tú é; d'fhuascail Íosa Úrmhac na hÓighe Beannaithe.
ᚠᚢᚦᚨᚱᚲ 𐌰𐌱𐌲 𓀀𓀁 𒀀𒁀 ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ ꓀ꓐ ⠓⠑⠇⠇⠕
Mixed: Москва-city 東京タワー and Ελλάδα mit 서울 en ไทย x²+y²≤z³ naïve café №5 ½¾ Ⅷ ①②③ ㊙
The price is $1,234.56 (≈ €1.100,00 or £999); 50% off; call +1-800-555-0199 before 23:59:59.
1 12 123 1234 12345 123456 1234567 12345678 3.14159265358979323846 1e-10 0x1F 0b1010 1_000_000
v1.2.3-beta+exp.sha.5114f85 192.168.0.1 2001:0db8:85a3::8a2e:0370:7334 2024-02-29T12:34:56Z
https://example.com/path/to/page?query=1&other=%20two#frag user.name+tag@example.co.uk C:\\Users\\name\\file.txt
SELECT * FROM users WHERE name LIKE '%O''Brien%' AND age >= 21; -- comment
#include <stdio.h> int main(void) { printf("Hello, %s!\\n", "world"); return 0; }
const f = async ({a, b = 2, ...rest}) => `${a?.b ?? c}` || !!b && a !== b;
fn main() { let v: Vec<u8> = vec![0; 10]; println!("{:?}", v.iter().map(|x| x + 1).collect::<Vec<_>>()); }
<!DOCTYPE html><html lang="en"><body class='a b'><p>Hi &amp; bye &#128512;</p><br/></body></html>
{"key": [1, 2.5, -3e10, null, true], "nested": {"a": "b\\u00e9"}}
$$\\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}$$ \\begin{align} a &= b \\\\ \\end{align}
CamelCaseIdentifier snake_case_identifier SCREAMING_SNAKE kebab-case-name iPhone eBay JSONHttpRequestV2 ПриВетМир
a'b 'quoted' "double" `tick` ''' \"\"\" ``` ... … — – - -- --- === !== != ?! !!! ???
'S 'T 'RE 'VE 'M 'LL 'D 'ſ 's 't 're 've 'm 'll 'd ’s ’t
()[]{}<>«»‹›「」 @#$%^&*_+=|~`;:',./? \\ //// ****
😀😃😄 🤣 👍👍🏻👍🏼👍🏽👍🏾👍🏿 🤷🏽‍♀️ 👨‍👩‍👧‍👦 👩🏾‍🚀 🏳️‍🌈 🏴‍☠️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿
🇩🇪🇫🇷🇯🇵🇺🇳 1️⃣2️⃣#️⃣*️⃣ ☺︎☺️ ❤️‍🔥 ♾️ ™️©® 🫠🫡🪿🫨
Thumbs👍up and text🎉mixed🎊together!!!🔥🔥🔥lol
e\u0301 a\u0308 n\u0303 \u1e69 s\u0323\u0307 s\u0307\u0323 Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d\u034f\u0334\u0319\u0324 algo
\u1100\u1161\u11a8 한글 ﬁ ﬂ ﬃ Å Å K Ω ſ ß ẞ İ ı ǅ ʰ ª º
\u200bzero\u200cwidth\u200djoiner\u2060word\ufeffbom \u202ertl\u202c \u00ad soft\u00adhyphen
nbsp\u00a0here\u2003em\u2009thin\u3000ideographic\u1680ogham\u180emongol\u2028line\u2029para\u0085nel
𝕳𝖊𝖑𝖑𝖔 𝓦𝓸𝓻𝓵𝓭 𝟙𝟚𝟛 ｆｕｌｌｗｉｄｔｈ Ａ１ ＃ ⓗⓔⓛⓛⓞ ᵗⁱⁿʸ ₁₂₃
\ufffd \ufffe \uffff \U0010ffff \U000e0001 \ue000 \U000f0000 \U0001f9ff \u0378
▁ ▁▁ a▁b ▁a > ▁</ x>▁</p> Ġ Ċ ĠĠ Âł <0x0A> <0xFF> <0xZZ> ⟨⟩
""".strip().split("\n")

AWKWARD = [
    "",
    *(" " * n for n in (1, 2, 3, 4, 7, 8, 16, 31, 32, 33, 64, 100)),
    *("\n" * n for n in (1, 2, 3, 4, 31, 32, 40)),
    *("\t" * n for n in (1, 2, 3, 5, 17)),
    *("\r", "\r\n", "\r\n\r\n", "\n\r", "a\r\nb\r\n", " \n", "\n ", " \n ", "\t\n \t", "\v\f", "a\u00a0 b", " \u00a0", "\u3000\u3000"),
    *(" a", "a ", "  a", "a  ", "   a   b    c", "\ta", "a\t", "\n a", "a\n", " a\n b", "a \n\n b", "  \n  a", "a   \n"),
    *("hello world", "Hello World", " hello", "hello  world", "hello   world   ", "HELLO", "hElLo"),
    *("\x00", "a\x00b", "\x00\x00", "\x01\x02\x03", "\x1b[31mred\x1b[0m", "\x7f", "\x80\x9f", "bell\x07", "\x08"),
    *("0", "00", "000", "0000", "1 000 000", "٣٤٥", "१२३४", "½", "Ⅳ", "1st 2nd", "x1y2z3", "3D4D", "٠١٢٣abc456", "１２３４５"),
    *("a" * n for n in (10, 100, 1000)),
    "ab" * 300,
    "antidisestablishmentarianism" * 12,
    "ﷺ" * 40,
    "字" * 200,
    "ก" * 100,
    "😀" * 50,
    "!" * 77,
    "-" * 200,
    "=" * 81,
    "0123456789" * 20,
    "é" * 65,
    "Ã©Â" * 20,
    "\u0301" * 30,
    "\u200d" * 10,
    "a b " * 60,
    " .\n" * 20,
    *("'", "''", "'s", "'S", " 's", "s'", "can't", "can''t", "'tis", "'re've", "'r", "'l", "o'clock's"),
    *("🤷🏽‍♀️", "👨‍👩‍👧‍👦", "\U0001f1e9", "\u200d\U0001f1e9\U0001f1ea", "❤", "❤\ufe0f", "e\u0301", "\u0301e"),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<pad>",
        "<bos>",
        "<eos>",
        "<mask>",
        "<0x41>",
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<start_of_turn>",
    ),
    *(
        "<|im_start",
        "<|im_start|",
        "<|im_end|><|im_end|>",
        "< |im_end|>",
        "<|IM_END|>",
        "<<|im_end|>>",
        "a<|im_end|>b",
        "a <|im_end|> b",
        "<bos><bos>a",
    ),
    *(
        "<eos>\n",
        "x<eos>y<bos>z",
        "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn",
        "<unused0>",
        "<unused99>",
        "[multimodal]",
    ),
    *(
        "<repo_name>a/b<file_sep>main.py\nprint(1)\n<|endoftext|>",
        "<table><tr><td>1</td></tr></table>",
        "<h1>x</h1>",
        "</table",
        "<img>",
        "</s><s>",
    ),
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by HF<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n",
    "<bos><start_of_turn>user\nWrite a haiku about Rust.<end_of_turn>\n<start_of_turn>model\n",
    "def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n\n\nprint([fib(i) for i in range(10)])\n",
    "class A:\n\tdef f(self, x: int = 0) -> None:\n\t\t'''doc'''\n\t\tself.x = x  # tab\n\t\n",
    "if (a) {\r\n    b();\r\n} else {\r\n\tc();\r\n}\r\n",
    "| a | b |\n|---|:-:|\n| 1 | 2 |\n\n* item\n  * sub\n1. one\n\n```python\nx = 1\n```\n> quote\n",
    "Title\n=====\n\nParagraph one.  \nLine two.\n\n\n\nParagraph   two.\t\tEnd.\n",
    "for(i=0;i<10;i++){a[i]=b[i]*2;}//x",
    "x = {'a': [1, 2, (3, 4)], \"b\": {5}}; y = x['a'][-1] ** 2 // 3 % 4 @ m",
    "    leading\n        more\n\ttab\n  \t mixed \t \n",
    "zażółć\u00a0gęślą\u2003jaźń\u3000东京\u2028x",
    "ÀÈÌÒÙ àèìòù ÂÊÎÔÛ ÃÑÕ ÄËÏÖÜŸ ÇŞŢ ČŠŽ ĄĘ ŁĐ",
    "\ufeffBOM first",
    "tail\ufeff",
]

# Kinds whose expressions llama.cpp only approximates: there ours follow the models' own tokenizer files.
OWN_EXPRESSIONS = {"tekken", "gpt-4o", "llama4", "kanana2", "minimax-m2", "kimi-k2"}


def metadata_of(path: str) -> dict[str, Any]:
    return {
        name: field.contents()
        for name, field in gguf.GGUFReader(path).fields.items()
        if name.startswith(("tokenizer.ggml", "general.name"))
    }


def write_vocabulary(path: Path, metadata: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_feed_forward_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, value in metadata.items():
        if name.endswith(("tokens", "merges")) or isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def llama_ids(path: str | Path, corpus: list[str], *, add_bos: bool = True) -> list[list[int]]:
    llama = Llama(str(path), vocab_only=True, verbose=False)
    return [llama.tokenize(text.encode(), add_bos=add_bos, special=True) for text in corpus]


class Recorder(dict[str, int]):
    """A dict that remembers which of its keys were asked for."""

    def __init__(self, items: dict[str, int]) -> None:
        super().__init__(items)
        self.used: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        if key in self:
            self.used.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> int:
        self.used.add(key)
        return super().__getitem__(key)


def record(tokenizer: Tokenizer, corpus: list[str]) -> tuple[set[str], set[str]]:
    """The tokens and the merges that were looked up, and found, while the corpus was encoded."""
    encoder: Any = tokenizer._encoder
    encoder._ids = Recorder(encoder._ids)
    merges: set[str] = set()
    if hasattr(encoder, "_rank"):
        rank = encoder._rank

        def recorded(left: str, right: str) -> int | None:
            found: int | None = rank(left, right)
            if found is not None:
                merges.add(f"{left} {right}")
            return found

        encoder._rank = recorded
    for text in corpus:
        tokenizer.encode(text)
    return encoder._ids.used, merges


def reduced(metadata: dict[str, Any], tokens: set[str], merges: set[str], corpus: list[str]) -> dict[str, Any]:
    """The metadata with only these tokens, by id, and these merges; special tokens stay if they occur in the corpus."""
    short = {k: v for k, v in metadata.items() if not isinstance(v, list)}
    everything = "\0".join(corpus)
    types, scores = metadata["tokenizer.ggml.token_type"], metadata.get("tokenizer.ggml.scores")
    kept = [
        i
        for i, token in enumerate(metadata["tokenizer.ggml.tokens"])
        if token in tokens or (types[i] != 1 and (token in everything or types[i] == 6 or i < 10))
    ]
    short["count"] = len(types)
    short["tokens"] = {i: [metadata["tokenizer.ggml.tokens"][i], types[i]] + ([scores[i]] if scores else []) for i in kept}
    if merges:
        short["merges"] = [merge for merge in metadata["tokenizer.ggml.merges"] if merge in merges]
    return short


def digest(ids: list[int]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:8]


def main(smollm: str, gemma: str) -> None:
    corpus = list(dict.fromkeys(SENTENCES + AWKWARD))
    output: dict[str, Any] = {"corpus": corpus, "models": {}, "kinds": {}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocabulary.gguf"
        byte_level, sentence_piece = metadata_of(smollm), metadata_of(gemma)
        tokens, merges = record(tokenizer_from_gguf(byte_level), corpus)
        tokens |= set(BYTE_CHARACTERS)
        for kind in sorted(KINDS):
            changed = {**byte_level, "tokenizer.ggml.pre": kind, "tokenizer.ggml.add_bos_token": False}
            kind_tokens, kind_merges = record(tokenizer_from_gguf(changed), corpus)
            tokens |= kind_tokens
            merges |= kind_merges
            if kind in OWN_EXPRESSIONS:
                continue
            write_vocabulary(file, changed)
            try:
                theirs = llama_ids(file, corpus)
            except ValueError:
                print(f"{kind}: unknown to this llama.cpp")
                continue
            ours = tokenizer_from_gguf(changed)
            wrong = [text for text, ids in zip(corpus, theirs, strict=True) if ours.encode(text) != ids]
            print(f"{kind}: {len(wrong)} differ", *(repr(text[:60]) for text in wrong[:6]))
            if KINDS[kind] not in [KINDS[other] for other in output["kinds"]]:
                output["kinds"][kind] = [digest(ids) for ids in theirs]
        output["models"]["smollm2"] = {"ids": llama_ids(smollm, corpus), "metadata": reduced(byte_level, tokens, merges, corpus)}
        prefixed = {**sentence_piece, "tokenizer.ggml.add_space_prefix": True}
        tokens = record(tokenizer_from_gguf(sentence_piece), corpus)[0] | record(tokenizer_from_gguf(prefixed), corpus)[0]
        write_vocabulary(file, prefixed)
        output["models"]["gemma3"] = {
            "ids": llama_ids(gemma, corpus),
            "prefixed": [digest(ids) for ids in llama_ids(file, corpus)],
            "metadata": reduced(sentence_piece, tokens, set(), corpus),
        }
    OUTPUT.write_text(json.dumps(output, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(f"{len(corpus)} strings, {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
