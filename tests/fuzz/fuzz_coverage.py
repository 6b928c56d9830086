"""As `fuzz_run`, guided by which lines of this project and of pydicom and nibabel an input reaches.

    python tests/fuzz/fuzz_coverage.py dicom --minutes 5

It needs atheris, which `make fuzz` installs; its own mutations and those of the format alternate.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import atheris

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "fuzz")]
MOST_BYTES = 65_536

with atheris.instrument_imports(include=["medsa_deploy", "pydicom", "nibabel"]):
    import fuzz_judge
    import fuzz_readers
    import fuzz_run


def main() -> None:
    """Read inputs of one format until its time is up; failures are kept as by `fuzz_run`."""
    parser = argparse.ArgumentParser(description="coverage-guided fuzzing of one format")
    parser.add_argument("format", choices=fuzz_readers.FORMATS)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"))
    options = parser.parse_args()
    options.failures.mkdir(parents=True, exist_ok=True)
    fuzz_judge.bound_process()
    with TemporaryDirectory(dir=fuzz_run.MEMORY) as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        judge = fuzz_judge.Judge(Path(folder))
        intact = judge.intact(options.format)
        for number, content in enumerate(intact):
            (corpus / str(number)).write_bytes(content)
        _run(options, judge, intact, corpus)


def _run(
    options: argparse.Namespace, judge: fuzz_judge.Judge, intact: list[bytes], corpus: Path
) -> None:
    counts: dict[str, int] = {}
    mutation = fuzz_readers.FORMATS[options.format].mutation

    def read(data: bytes) -> None:
        failure = judge.judge(options.format, data)
        if failure is not None:
            counts[failure.kind] = counts.get(failure.kind, 0) + 1
            if counts[failure.kind] <= fuzz_run.MOST_OF_A_KIND:
                index = sum(counts.values())
                print(f"failure: {failure.kind}", flush=True)
                fuzz_run.keep_input(
                    options.failures,
                    f"{options.format}-guided{options.seed}-{index}",
                    data,
                    failure,
                )

    def mutate(data: bytes, most_bytes: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < 0.5:
            return atheris.Mutate(data, most_bytes)
        try:
            return mutation(random, [data, *intact[:1]])[:most_bytes]
        except Exception:  # what libFuzzer has changed may no longer have the format's form
            return atheris.Mutate(data, most_bytes)

    arguments = [
        sys.argv[0],
        str(corpus),
        f"-max_total_time={round(60 * options.minutes)}",
        f"-max_len={MOST_BYTES}",
        f"-seed={options.seed + 1}",
        f"-artifact_prefix={options.failures}/{options.format}-",
        "-rss_limit_mb=0",
        "-timeout=120",
        "-print_final_stats=1",
    ]
    atheris.Setup(arguments, read, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
