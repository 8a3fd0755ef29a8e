# SPDX-License-Identifier: GPL-2.0-or-later
"""Chapter 3: one kernel dies, the next is born.

A *kernel* here is not a process. It is a record (kernel.json) and the tables in RAM that it points to:
the owner of each page block, the place of the super block. Mounts run on it as programs do. A *kexec*
replaces it by another one that knows only RAM, the hardware, nvram.json and its command line, whose
`pkram=` is the number that leads to all that was preserved.

       running kernel            nobody                        next kernel
    ───────────────────┬───────────────────────────┬──────────────────────────────
     nvram: pending    │ segments into RAM         │ kernel.json (renamed: it is up)
     region list       │ fresh process: find,      │ consume the old super block
     super block ──────┼─▶ check, place, punch ────┼─▶ free what boot needed
                       │ all but what is reserved  │ pending cleared
              kernel.json removed          kernel.json written
              (point of no return)

What this chapter promises upwards:

* A page that a listed node names is the same before and after, whatever dies in between. Until the
  next kernel is up, nothing that was handed over is overwritten or freed, and every step may be
  repeated. The next mount or pkram-kexec finishes a half-done boot.
* A page that was not reserved is gone: punched, or poisoned where a test asks for it.
* What cannot work (no room, damaged metadata, a wrong pkram=) is refused while the old kernel lives.

The chapter needs RAM and a firmware map, memory leased in blocks of one owner (machine/), and records
that can be checked without being trusted (pkram/). It knows neither files nor mounts: the commands
say what is mounted, and how to stop it.

Read in this order:

    cmdline       words, and the options boot understands
    image         what a kernel file says about the memory it wants
    segments      the next kernel's pieces and their destinations
    nvram         the boot that is decided and not finished
    staging       where a loaded kernel waits
    kernelrecord  kernel.json
    history       what the kernels before were, for people
    kaslr         the places for a kernel, and the choice of one
    placement     where everything goes; asked by the planner and by boot
    incoming      what the last kernel left, checked
    salvage       whole nodes of a damaged list, for a forced kexec
    leasetable    the lease table, from holes, kernel and nodes
    boot          the steps from power-on to kernel.json
    hostboot      a boot of the host, noticed by a machine on memory that survived it
    hostload      what must be true of the kernel that kexec(8) boots next
    booting       the process that boots, perhaps there before its time
    succession    one kernel ends, the next one boots and takes over
    ownership     the owner of a page block, from every witness
    running       find the running kernel; bring it up first if need be
    iomem         the resource map
    memorymap     the same as a picture, rows of cells
    loading       -l: destinations that overwrite nothing that is preserved
    steps         operations that are described first, done in order, and undone if a later one fails
    transition    the steps of a kexec: what each does, and how it is undone
    kexec         the plan of -e, and the order of all of it
    costs         what bans and relocation cost, and what scratch would
    crash         a kernel that examines the dead one

Some words mean one thing each in this chapter: a *Pending* is a boot that was decided, a *BootProgress*
one that is under way; a *Plan* is what `-e` will do, and *Boot* is one of its operations; to *publish* a
kernel is to rename kernel.json.

Kernel: kernel/kexec*.c, arch/x86/boot/compressed, arch/x86/kernel/setup.c, init/main.c
"""
