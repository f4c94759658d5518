"""Formulas as MathML, which browsers draw themselves: no script, and nothing from a network."""

from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import ExtensionError


def formula(node: nodes.Element, as_block: bool) -> str:
    """MathML of a formula in LaTeX. Raises ExtensionError where it has what docutils does not know."""
    try:
        return tex2mathml(node.astext(), as_block=as_block)
    except Exception as error:
        raise ExtensionError(f"{node.astext()!r} cannot be MathML: {error}") from error


def visit_inline(writer: Any, node: nodes.Element) -> None:
    writer.body.append(formula(node, as_block=False))
    raise nodes.SkipNode


def visit_block(writer: Any, node: nodes.Element) -> None:
    writer.body.append(writer.starttag(node, "div", CLASS="formula") + formula(node, as_block=True) + "</div>\n")
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
