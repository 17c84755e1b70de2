import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "notebooks" / "gnbench.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = [
        str(output.get("text", "")) + str(output.get("data", ""))
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    ]
    text = "\n".join(outputs)
    assert "2,396,330 parameters" in text
    assert "num_groups=24 does not divide 32 channels" in text
    assert "n_seeds" in text
    assert "image/png" in text
    assert "precise" in text
    assert "optimizer.lr: 0.001 in a, 0.003 in b" in text
    assert "Verdict: " in text
    assert "MB: open it in a browser" in text
