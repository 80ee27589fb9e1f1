"""What was aimed at before it was measured. A bar reads a result and says the value, its interval where there is one, and whether it is met."""
from dataclasses import dataclass

@dataclass(frozen=True)
class Bar:
    "An aim, and where in a benchmark's result it is read."
    benchmark: str
    brief: str            # in the picture
    says: str
    read: object          # found -> (value, low or None, high or None)
    least: float = None   # the value must be so much or more
    most: float = None    # or so much or less
    unit: str = ""

    def met(self, found) -> bool:
        "Is it? Where two limits are given, the whole interval must lie between them."
        value, low, high = self.read(found)
        if self.least is not None and self.most is not None and low is not None:
            return self.least <= low and high <= self.most
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def sure(self, found) -> bool:
        "Does the whole interval lie on the side where the value is?"
        ends = [x for x in self.read(found) if x is not None]
        return len({(self.least is None or x >= self.least) and (self.most is None or x <= self.most) for x in ends}) == 1

    def aim(self) -> str:
        "The limit in words."
        if self.least is not None and self.most is not None:
            return f"{self.least:g} to {self.most:g}{self.unit}"
        return f"{self.least:g}{self.unit} or more" if self.least is not None else f"{self.most:g}{self.unit} or less"


def ratio(of="ratio"):
    "A ratio and its interval; older results know only the range of the pairs."
    return lambda found: (found[of], found.get(f"{of}_low", found.get(f"{of}_min")), found.get(f"{of}_high", found.get(f"{of}_max")))


def number(*path):
    "A number without an interval."
    def read(found):
        for key in path:
            found = found[key]
        return found, None, None
    return read


def case(name):
    "Whole step: CPU seconds of TRL at its faster micro-batch over ours at our faster; a range where both take all replies at once."
    def read(found):
        best = {who: min((who, f"{who}, lean"), key=lambda way: found[name][way]["seconds"]) for who in ("ours", "trl")}
        if best == {"ours": "ours", "trl": "trl"}:
            return ratio()(found[name]["trl"])
        return found[name][best["trl"]]["seconds"] / found[name][best["ours"]]["seconds"], None, None
    return read


def worst(way):
    "Whole step: the largest share of memory, over cases."
    return lambda found: (max(case[way]["memory_of_ours"] for name, case in found.items() if isinstance(case, dict) and way in case), None, None)


def peer(size, name, mine):
    "Attribution: CPU seconds of a peer over ours, its interval the range of neighbouring processes."
    return lambda found: (found[size][name][f"ratio to {mine}"], found[size][name][f"ratio_min to {mine}"], found[size][name][f"ratio_max to {mine}"])


def peer_memory(size, name, mine):
    "Attribution: megabytes of ours over those of a peer."
    return lambda found: (found[size][mine]["megabytes"] / found[size][name]["megabytes"], None, None)


STEPS = {"words, P16": 1.3, "words, P128": 1.8, "words, P384": 2.0, "words, P128, V16k": 3.5, "pictures, 36 tokens": 1.5, "pictures, 256 tokens": 4.0, "pictures, 36 tokens, V16k": 3.8}
BARS = [
    *(Bar("whole step", f"whole step, {name}: time", f"a whole GRPO step, {name}: CPU time of TRL 1.16 over ours, each at its faster micro-batch", case(name), least=limit, unit=" ×") for name, limit in STEPS.items()),
    Bar("whole step", "whole step: memory, TRL lean", "memory over that of TRL at its leanest micro-batch, the worst case", worst("trl, lean"), most=1.0, unit=" ×"),
    Bar("whole step", "whole step: memory, equal micro-batch", "memory over that of TRL at an equal micro-batch, the worst case", worst("trl"), most=.6, unit=" ×"),
    Bar("learning", "area under the learning curve", "plain GRPO, area under the learning curve over that of TRL's own trainer, five seeds", lambda f: (f["ratio"], f["low"], f["high"]), least=.9, most=1.1, unit=" ×"),
    Bar("head", "head: time, TRL", "log-prob and entropy, vocabulary 49,152: CPU time of TRL's chunks over ours", lambda f: (f["ratio_trl"], f.get("ratio_low"), f.get("ratio_high")), least=2.5, unit=" ×"),
    Bar("head", "head: memory, TRL", "the same: memory over that of TRL's chunks", number("memory_share_of_trl"), most=.25, unit=" ×"),
    Bar("head", "head: time, log-softmax", "the same: CPU time of a plain log-softmax over ours", number("ratio_plain"), least=1.0, unit=" ×"),
    *(Bar("attribution", f"attribution, {size}: time, {name.title()}", f"input × gradient of every token, {size}: CPU time of {name.title()} over ours", peer(size, name, "ours"), least=3.0, unit=" ×") for size in ("P48 T24", "P128 T64") for name in ("captum", "inseq")),
    *(Bar("attribution", f"attribution, {size}: memory, {name.title()}", f"the same with less room, {size}: memory over that of {name.title()}", peer_memory(size, name, "ours, less room"), most=1.0, unit=" ×") for size in ("P48 T24", "P128 T64") for name in ("captum", "inseq")),
    Bar("rollouts, 36 image tokens", "replies, 36 image tokens: time", "drawing replies, 36 image tokens: CPU time of generate over ours, the same tokens", ratio(), least=1.5, unit=" ×"),
    Bar("rollouts, 256 image tokens", "replies, 256 image tokens: time", "the same with 256 image tokens", ratio(), least=2.0, unit=" ×"),
    Bar("scoring, 128 prompt tokens", "scoring, shared prompt: time", "forward and backward of 8 replies a prompt of 128 tokens: the prompt run 8 times over once", ratio(), least=2.0, unit=" ×"),
    Bar("health", "health metrics: time", "a training step with health metrics over one without", ratio(), most=1.15, unit=" ×"),
    Bar("recording", "recording: time", "ten steps that are recorded over ten that are not", ratio(), most=1.15, unit=" ×"),
    Bar("pictures", "slowest picture", "the slowest picture of a probe, a recorded step of 512 replies", number("slowest"), most=1.0, unit=" CPU s"),
    Bar("memory", "smollm2 in one piece", "GRPO of smollm2 with adapters, 64 replies in one piece: memory of the whole process at its peak", number("smollm2", "megabytes"), most=6144, unit=" MB"),
    Bar("memory", "smollm2, 16 at once", "the same 16 replies at a time (--micro 16, the same numbers)", number("smollm2, 16 at once", "megabytes"), most=6144, unit=" MB"),
    Bar("selection", "selection: visual gain", "visual information gain: positions run over those of one forward pass of each sample", number("vig_passes"), most=2.2, unit=" ×"),
    Bar("selection", "selection: LESS features", "LESS features over one epoch of training on the same pool: CPU time", number("less_over_epoch"), most=3.0, unit=" ×"),
    Bar("selection", "selection: choosing", "choosing from 10,000 problems by 512 features, the slowest algorithm", lambda f: (max(f["choosing_seconds"].values()), None, None), most=5.0, unit=" CPU s"),
]
