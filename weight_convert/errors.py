"""The one error root of the project.

It lives in the lowest room (standard library only), so that `backends`, `weight_convert` and
`unillava` can all derive from it without importing one another.
"""


class UnillavaError(Exception):
    """Something the user can mend: says what is wrong, what was given, expected, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(
        self,
        problem: str,
        *,
        given: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.problem, self.given, self.expected, self.fix = problem, given, expected, fix
        details = (("given", given), ("expected", expected), ("what to do", fix))
        lines = [problem, *(f"  {label}: {text}" for label, text in details if text is not None)]
        super().__init__("\n".join(lines))


class CheckpointError(UnillavaError):
    """A checkpoint directory or weight file is absent, damaged, or contradicts itself."""
