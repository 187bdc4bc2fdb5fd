"Run nbdev_test over every notebook and end with a line that counts: one notebook is one test."
import os, re, subprocess, sys

env = dict(os.environ, OMP_NUM_THREADS=os.environ.get('OMP_NUM_THREADS', '1'), PYTHONUNBUFFERED='1')
p = subprocess.Popen(['nbdev_test', '--do_print', '--timing', '--n_workers', str(max(2, min(os.cpu_count() or 2, 4)))], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
lines = []
for line in p.stdout: sys.stdout.write(line); sys.stdout.flush(); lines.append(line.rstrip())
code = p.wait()
ran = sum(l.startswith('Starting ') for l in lines)
after = [i for i, l in enumerate(lines) if 'nbdev Tests Failed On The Following Notebooks' in l]
failed = sum(bool(re.fullmatch(r'\s+\S+\.ipynb', l)) for l in lines[after[-1]:]) if after else 0
if code and not failed: failed = 1        # nbdev_test itself broke down
print(f'{ran - failed} passed, {failed} failed')
sys.exit(1 if code or failed or not ran else 0)
