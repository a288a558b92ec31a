"""What a step of SEAM, PPC and RCM-MAM costs with ResNet38, against another version of the code.

    python tests/benchmarks/resnet38_steps.py --before DIR [--width 64] [--size 192]

DIR is the root of the other version, e.g. of `git worktree add DIR COMMIT`. Two images, 20 classes, random weights.
Width 64 and crops of 192 (RCM-MAM) or 448 are the papers' and take a minute a step.
"""

from before_after import HEADER, HERE, Version, compare, parser, show


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--width", type=int, default=16)
    arguments.add_argument("--methods", nargs="+", default=["seam", "ppc", "rcm_mam"])
    given = arguments.parse_args()
    versions = [Version(given.before), Version(HERE)]
    print(HEADER)
    for method in given.methods:
        case = {"method": method, "classes": 20, "size": given.size, "images": 2, "width": given.width}
        show(method, compare(versions, case, given.rounds))


if __name__ == "__main__":
    main()
