"Modules as the API pages show them: the comment behind a parameter or a field is part of what they say"
import ast
import io
import re
import tokenize

SECTION = re.compile(r"^(Parameters|Returns|Raises|Examples)\n-{3,}$", re.M)


def _written(comment):
    "A comment as words of a page: what Markdown would read as marks is escaped, code stays code"
    parts = re.split(r"(`[^`]*`)", comment)
    return "".join(part if part.startswith("`") else re.sub(r"([\\`*_{}\[\]<>$|~])", r"\\\1", part) for part in parts)


def _comments(source):
    "The comment behind the code of each line"
    found, lines = {}, source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT and lines[row - 1][:column].strip():
            found[row] = _written(token.string.lstrip("#: ").removeprefix("noqa").strip())
    return found


def _said(function, comments):
    "What is said of the parameters and of the result, as a list"
    given = function.args
    last = {each.lineno: each for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)} # one a line
    rows = [f"- `{each.arg}`: {comments[line]}" for line, each in sorted(last.items()) if line in comments
            and line != function.body[0].lineno]
    closing = range(max(last, default=function.lineno) + 1, function.body[0].lineno)
    rows += [f"- returns {comments[line]}" for line in closing if line in comments]
    return "\n".join(rows)


def _listed(text):
    "A docstring whose sections in numpy's style are lists: Markdown would take their titles for headings"
    first, *parts = re.split(r"^(\w+)\n-{3,}$", text, flags=re.M)
    pieces = [first.strip()]
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        if title == "Examples": rows = f"```python\n{body.strip()}\n```"
        else:
            entries = re.findall(r"^(\S[^\n]*)((?:\n[ ]+[^\n]*)*)", body, re.M)
            rows = "\n".join(f"- {_entry(line)}{': ' * bool(said)}{_written(' '.join(said.split()))}"
                             for line, said in entries)
        pieces.append(f"**{title}**\n\n{rows}")
    return "\n\n".join(pieces)


def _entry(line):
    "`name : type` of a section, the names as code"
    names, _, kind = line.partition(" : ")
    return ", ".join(f"`{name}`" for name in names.split(", ")) + (f" ({_written(kind)})" if kind else "")


def _simple(default):
    "Whether autodoc2 can write this default down"
    return not any(isinstance(part, (ast.IfExp, ast.GeneratorExp, ast.ListComp, ast.DictComp, ast.SetComp, ast.Lambda))
                   for part in ast.walk(default))


def _replaced(node):
    "The change that lists the sections of a docstring"
    place = node.body[0]
    return ((place.lineno, place.col_offset, place.end_lineno, place.end_col_offset),
            repr(_listed(ast.get_docstring(node))))


def described(source):
    "The module with those comments in its docstrings, and `...` for a default that only code can say"
    comments, changes = _comments(source), []  # (first, last line and column of what is replaced, by what)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            if SECTION.search(ast.get_docstring(node) or ""): changes.append(_replaced(node))
            changes += [((each.end_lineno, each.end_col_offset) * 2, f"; {comments[each.end_lineno]!r}")
                        for each in node.body if isinstance(each, ast.AnnAssign) and each.end_lineno in comments]
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
        changes += [((each.lineno, each.col_offset, each.end_lineno, each.end_col_offset), "...")
                    for each in (*node.args.defaults, *node.args.kw_defaults) if each is not None and not _simple(each)]
        said, first = _said(node, comments), node.body[0]
        if SECTION.search(ast.get_docstring(node) or ""): changes.append(_replaced(node))
        elif said and ast.get_docstring(node) is not None:
            changes.append(((first.lineno, first.col_offset, first.end_lineno, first.end_col_offset),
                            repr(f"{ast.get_docstring(node)}\n\n{said}")))
        elif said:
            changes.append(((first.lineno, first.col_offset) * 2, f"{said!r}; " if not isinstance(first, (
                ast.If, ast.For, ast.With, ast.Try, ast.While, ast.FunctionDef, ast.ClassDef, ast.AsyncFor,
                ast.AsyncWith)) else f"{said!r}\n{' ' * first.col_offset}"))
    lines = [line.encode() for line in source.splitlines(keepends=True)] # ast counts bytes
    for (row, column, last_row, last_column), text in sorted(changes, reverse=True):
        tail = lines[last_row - 1][last_column:]
        lines[row - 1:last_row] = [lines[row - 1][:column] + text.encode() + tail]
    return b"".join(lines).decode()
