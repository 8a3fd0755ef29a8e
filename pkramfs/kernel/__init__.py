# SPDX-License-Identifier: GPL-2.0-or-later
"""Chapter 3: one kernel dies, the next is born.

A *kernel* here is no process. It is a record (kernel.json) and the tables in RAM that it points to:
who owns which page block, where the super block is. Mounts work under it as programs do. A *kexec*
replaces it by another one that knows nothing but RAM, the hardware, and one number on its command
line, `pkram=`.

       running kernel            nobody                        next kernel
    ───────────────────┬───────────────────────────┬──────────────────────────────
     nvram: pending    │ segments into RAM         │ kernel.json (renamed: it is up)
     region list       │ fresh process: find,      │ consume the old super block
     super block ──────┼─▶ check, place, punch ────┼─▶ free what boot needed
                       │ all but what is reserved  │ pending cleared
              kernel.json removed          kernel.json written
              (point of no return)

What this chapter promises upwards:

* A page that a published node names is the same before and after, whatever dies in between: until
  the next kernel is up, nothing that was handed over is overwritten or freed, and every step may
  be done again. Whoever finds a half-done boot finishes it.
* A page that was not reserved is not there any more: punched, or poisoned where a test asks for it.
* What cannot work (no room, damaged metadata, a wrong pkram=) is refused while the old kernel lives.

What it needs from below: RAM and a firmware map, memory leased in blocks of one owner (machine/),
and records that can be checked without being trusted (pkram/). It knows neither files nor mounts:
the commands tell it what is mounted, and give it the means to stop that.

Read in this order:

    cmdline      words, and the options boot understands
    image        what a kernel file says about the memory it wants
    segments     the next kernel's pieces and their destinations
    nvram        what is decided and not finished
    staging      where a loaded kernel waits
    kernelrecord kernel.json
    kaslr        which places there are, and the choice of one
    placement    where everything goes; asked by the planner and by boot
    incoming     what the last kernel left, checked
    leasetable   the lease table, from holes, kernel and nodes
    iomem        the resource map
    boot         the steps from power-on to kernel.json
    running      attach: boot, resume, take over, or just look
    loading      -l: destinations that overwrite nothing that is preserved
    steps        what is described before it is done, and undone if a later step fails
    kexec        the plan of -e, and the order of all of it
    costs        what bans and relocation cost, and what scratch would
    crash        a kernel to look at the dead one with

Kernel: kernel/kexec*.c, arch/x86/boot/compressed, arch/x86/kernel/setup.c, init/main.c
"""
