"""Tables on stdout: plain and of any width in a pipe."""

from hf_switch_sae.cli.tables import print_table


def test_a_table_in_a_pipe_is_plain_text_with_a_line_for_each_row(capsys):
    name = "layers.15.resid_post/" + "a-very-long-name-" * 20
    print_table([[name, "0.125", "[bold]"], ["b", "", "7"]], ["SAE", "fvu", "l0"])
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["SAE", "fvu", "l0"]
    assert first.split() == [name, "0.125", "[bold]"]  # not taken for rich's markup
    assert second.split() == ["b", "7"]
    assert len(second) == len(first), "numbers are on the right"


def test_a_table_without_a_head_has_rows_alone(capsys):
    print_table([["fvu", "0.5"], ["l0", "32"]])
    assert capsys.readouterr().out == "fvu  0.5\nl0    32\n"
