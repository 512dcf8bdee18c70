"""How Sphinx builds the site of these pages: `make docs`. The choices are in adr/0012-documentation.md."""

import click
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import dynamixer
from dynamixer.cli import cli

project = "dynamixer"
release = version = dynamixer.__version__
project_copyright = "The dynamixer developers, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!dynamixer\b).*")]  # other projects' names: linking them would need a network

myst_heading_anchors = 3
highlight_language = "text"  # what is indented is a command
default_role = "code"  # docstrings write names between single backticks
add_module_names = False
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = "dynamixer"
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f5a96", "color-brand-content": "#1f5a96"},
    "dark_css_variables": {"color-brand-primary": "#8ab8e6", "color-brand-content": "#8ab8e6"},
}


class Help(SphinxDirective):
    """What `dynamixer COMMAND --help` prints, for `{help} COMMAND` or `{help} GROUP COMMAND`."""

    has_content = False
    required_arguments, optional_arguments = 1, 1

    def run(self) -> list[nodes.Node]:
        """The text as a literal block."""
        context, command = click.Context(cli, info_name="dynamixer", max_content_width=88, terminal_width=88), cli
        for word in self.arguments:
            command = command.commands[word]
            context = click.Context(command, info_name=word, parent=context, terminal_width=88)
        text = command.get_help(context)
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Sphinx) -> None:
    """Add the directive."""
    app.add_directive("help", Help)
