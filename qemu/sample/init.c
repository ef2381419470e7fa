/*
 * The sample's first and only program, without a C library: plants what tests look for, says on the console what
 * it planted (`KSTUB-FACT key=value`), and panics the kernel from CPU 1 while CPU 0 is busy in user mode.
 */
#include <asm/unistd.h>

#define SPIN_CPU 0
#define CRASH_CPU 1
#define O_RDONLY 0
#define O_WRONLY 1
#define PR_SET_NAME 15
#define S_IFCHR 0020000
#define KMSG_MAJOR 1
#define KMSG_MINOR 11
#define PAGE_SIZE 4096
#define PFN_MASK ((1UL << 55) - 1)

static long syscall5(long number, long a, long b, long c, long d, long e)
{
	long result;
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;

	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
			 : "rcx", "r11", "memory");
	return result;
}

#define syscall(number, a, b, c) syscall5(number, (long)(a), (long)(b), (long)(c), 0, 0)

static unsigned long length(const char *text)
{
	unsigned long n = 0;

	while (text[n])
		n++;
	return n;
}

static int same(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}

static void say(const char *text)
{
	syscall(__NR_write, 1, text, length(text));
}

static void say_number(unsigned long value, unsigned int base)
{
	char text[24];
	char *at = text + sizeof(text) - 1;

	*at = 0;
	do
		*--at = "0123456789abcdef"[value % base];
	while (value /= base);
	say(at);
}

static void fact(const char *key, const char *value)
{
	say("KSTUB-FACT ");
	say(key);
	say("=");
	say(value);
	say("\n");
}

static void fact_number(const char *key, unsigned long value, unsigned int base)
{
	say("KSTUB-FACT ");
	say(key);
	say(base == 16 ? "=0x" : "=");
	say_number(value, base);
	say("\n");
}

static _Noreturn void fail(const char *what)
{
	say("KSTUB-GUEST-FAILED ");
	say(what);
	say("\n");
	for (;;)
		syscall(__NR_pause, 0, 0, 0);
}

static void check(long result, const char *what)
{
	if (result < 0)
		fail(what);
}

static int open_file(const char *path, int mode)
{
	long file = syscall(__NR_open, path, mode, 0);

	check(file, path);
	return (int)file;
}

static void become(const char *name, int cpu)
{
	unsigned long cpus = 1UL << cpu;

	check(syscall(__NR_prctl, PR_SET_NAME, name, 0), "prctl");
	check(syscall(__NR_sched_setaffinity, 0, sizeof(cpus), &cpus), "sched_setaffinity");
}

static void pause_for(long seconds)
{
	long time[2] = { seconds, 0 };

	syscall(__NR_nanosleep, time, 0, 0);
}

/* Not constant, and written to below: a page of the task's own, which no filter for page cache takes. */
static char planted[64] = "?his string lies in the memory of kstub-spin";

static unsigned long physical(const void *at)
{
	unsigned long entry = 0;
	int file = open_file("/proc/self/pagemap", O_RDONLY);

	check(syscall5(__NR_pread64, file, (long)&entry, sizeof(entry), (long)at / PAGE_SIZE * sizeof(entry), 0), "pagemap");
	syscall(__NR_close, file, 0, 0);
	return (entry & PFN_MASK) * PAGE_SIZE + (unsigned long)at % PAGE_SIZE;
}

extern const char spin_loop[];

static _Noreturn void spin(void)
{
	become("kstub-spin", SPIN_CPU);
	planted[0] = 'T';
	fact_number("spin.pid", syscall(__NR_getpid, 0, 0, 0), 10);
	fact_number("spin.rip", (unsigned long)spin_loop, 16);
	fact_number("spin.rbx", 0x6b73747562000bUL, 16);
	fact_number("spin.r12", 0x6b73747562000cUL, 16);
	fact_number("spin.r13", 0x6b73747562000dUL, 16);
	fact_number("string.address", (unsigned long)planted, 16);
	fact_number("string.physical", physical(planted), 16);
	fact("string.text", planted);
	__asm__ volatile("movabs $0x6b73747562000b, %rbx\n\t"
			 "movabs $0x6b73747562000c, %r12\n\t"
			 "movabs $0x6b73747562000d, %r13\n\t"
			 ".globl spin_loop\n"
			 "spin_loop: jmp spin_loop");
	__builtin_unreachable();
}

static _Noreturn void sleep_for_ever(void)
{
	become("kstub-sleep", CRASH_CPU);
	fact_number("sleep.pid", syscall(__NR_getpid, 0, 0, 0), 10);
	for (;;)
		pause_for(1000000);
}

static _Noreturn void crash(void)
{
	int file = open_file("/proc/sysrq-trigger", O_WRONLY);

	become("kstub-crash", CRASH_CPU);
	fact_number("crash.pid", syscall(__NR_getpid, 0, 0, 0), 10);
	fact_number("crash.cpu", CRASH_CPU, 10);
	say("KSTUB-GUEST-READY\n");
	syscall(__NR_write, file, "c", 1);
	fail("sysrq-c");
}

static const char *const symbols[] = { "_text",		 "_stext",	"_etext",	 "init_task",	"linux_banner",
				       "init_uts_ns",	 "schedule",	"panic",	 "jiffies_64",	"runqueues",
				       "swapper_pg_dir", "log_buf",	"page_offset_base", "vmemmap_base", "__per_cpu_offset",
				       "init_top_pgt", 	"sysrq_handle_crash" };

/* A line of /proc/kallsyms is `ffffffff81000000 T _text`. */
static void symbol_fact(char *line)
{
	char *name = line + 19;

	for (unsigned int i = 0; i < sizeof(symbols) / sizeof(*symbols); i++)
		if (length(line) > 19 && same(name, symbols[i])) {
			say("KSTUB-FACT kallsyms.");
			say(name);
			line[16] = 0;
			say("=0x");
			say(line);
			say("\n");
		}
}

static void symbol_facts(void)
{
	static char buffer[PAGE_SIZE], line[512];
	unsigned int at = 0;
	int file = open_file("/proc/kallsyms", O_RDONLY);
	long size;

	while ((size = syscall(__NR_read, file, buffer, sizeof(buffer))) > 0)
		for (long i = 0; i < size; i++)
			if (buffer[i] == '\n') {
				line[at] = 0;
				symbol_fact(line);
				at = 0;
			} else if (at < sizeof(line) - 1) {
				line[at++] = buffer[i];
			}
	syscall(__NR_close, file, 0, 0);
}

static void log_line(const char *text)
{
	int file;

	syscall(__NR_mknod, "/dev/kmsg", S_IFCHR | 0600, KMSG_MAJOR << 8 | KMSG_MINOR);
	file = open_file("/dev/kmsg", O_WRONLY);
	check(syscall(__NR_write, file, text, length(text)), "/dev/kmsg");
	syscall(__NR_close, file, 0, 0);
}

static void start(void (*body)(void))
{
	long pid = syscall(__NR_fork, 0, 0, 0);

	check(pid, "fork");
	if (pid == 0)
		body();
	/* Its facts are to be on the console before the next one's. */
	pause_for(1);
}

_Noreturn void _start(void)
{
	syscall(__NR_mkdir, "/proc", 0755, 0);
	check(syscall5(__NR_mount, (long)"proc", (long)"/proc", (long)"proc", 0, 0), "/proc");
	symbol_facts();
	log_line("<5>kstub: a planted line in the kernel log\n");
	start(spin);
	start(sleep_for_ever);
	start(crash);
	for (;;)
		pause_for(1000000);
}
